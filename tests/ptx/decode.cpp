#include "decode.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace ptx {
namespace {

const Opcodes& opcodes() {
  static const Opcodes all = [] {
    Opcodes o;
    for (auto add : {add_integer, add_bits, add_float, add_approx, add_convert, add_compare, add_move,
                     add_memory, add_atomic, add_async, add_matrix, add_warp, add_control})
      add(o);
    return o;
  }();
  return all;
}

const std::unordered_map<std::string_view, Constant> kSpecial = {
    {"%tid.x", Constant::kTidX},
    {"%tid.y", Constant::kTidY},
    {"%tid.z", Constant::kTidZ},
    {"%ntid.x", Constant::kNtidX},
    {"%ntid.y", Constant::kNtidY},
    {"%ntid.z", Constant::kNtidZ},
    {"%ctaid.x", Constant::kCtaidX},
    {"%ctaid.y", Constant::kCtaidY},
    {"%ctaid.z", Constant::kCtaidZ},
    {"%nctaid.x", Constant::kNctaidX},
    {"%nctaid.y", Constant::kNctaidY},
    {"%nctaid.z", Constant::kNctaidZ},
    {"%laneid", Constant::kLaneId},
    {"%warpid", Constant::kWarpId},
    {"%nwarpid", Constant::kNumWarps},
    {"%lanemask_eq", Constant::kLaneMaskEq},
    {"%lanemask_le", Constant::kLaneMaskLe},
    {"%lanemask_lt", Constant::kLaneMaskLt},
    {"%lanemask_ge", Constant::kLaneMaskGe},
    {"%lanemask_gt", Constant::kLaneMaskGt},
    {"%smid", Constant::kSmId},
    {"%nsmid", Constant::kNumSms},
    {"%dynamic_smem_size", Constant::kDynamicShared},
    {"%total_smem_size", Constant::kTotalShared},
};

uint64_t up(uint64_t value, uint64_t align) { return (value + align - 1) / align * align; }

// Shared variables stand 128 bytes apart, a row of banks, so that an index past one does not reach the next.
constexpr uint64_t kSharedGap = 128;

}  // namespace

class ProgramDecoder {
 public:
  ProgramDecoder(const Module& module, const Symbols& symbols, Program& out)
      : module_(module), symbols_(symbols), out_(out) {}
  void run(const std::string& kernel);
  const Code* function(const std::string& name, int line);

  const Module& module_;
  const Symbols& symbols_;
  Program& out_;
  std::unordered_map<std::string, uint64_t> shared_;  // of the module
  std::vector<std::string> dynamic_;                  // extern shared arrays: all begin where the static end

 private:
  const Function& find(const std::string& name, int line) const;
  uint64_t place_shared(const Variable& v);
  void reserve_shared(const Function& f, std::unordered_map<std::string, bool>& seen);
  void decode(const Function& f, Code& code);

  std::unordered_map<std::string, std::vector<uint64_t>> function_shared_;
  std::unordered_map<std::string, Code*> codes_;
  uint64_t shared_end_ = 0;
};

const Function& ProgramDecoder::find(const std::string& name, int line) const {
  for (const Function& f : module_.functions)
    if (f.name == name) {
      if (!f.is_defined)
        fail(line, "unsupported: function '%s' is declared and not defined here", name.c_str());
      return f;
    }
  fail(line, "there is no function '%s'", name.c_str());
}

uint64_t ProgramDecoder::place_shared(const Variable& v) {
  if (v.size == 0) return ~0ull;  // dynamic: known when all static ones are
  const uint64_t at = up(shared_end_, std::max<uint64_t>(v.align, 16));
  out_.shared.push_back({at, at + v.size});
  shared_end_ = up(at + v.size, 128) + kSharedGap;
  return at;
}

// All shared variables get their place before any instruction is decoded, as the dynamic ones follow the
// static.
void ProgramDecoder::reserve_shared(const Function& f, std::unordered_map<std::string, bool>& seen) {
  if (!seen.emplace(f.name, true).second) return;
  for (const Variable& v : f.variables)
    function_shared_[f.name].push_back(v.space == "shared" ? place_shared(v) : 0);
  for (const Statement& s : f.body) {
    for (const Operand& o : s.operands) {
      const auto visit = [&](const auto& self, const Operand& at) -> void {
        for (const Operand& e : at.elements) self(self, e);
        if (at.kind != Operand::kName) return;
        for (const Variable& v : module_.variables)
          if (v.name == at.name && v.space == "shared" && !shared_.contains(v.name))
            shared_[v.name] = place_shared(v);
      };
      visit(visit, o);
    }
    if (s.opcode.starts_with("call"))
      for (const Operand& o : s.operands)
        for (const Function& g : module_.functions)
          if (o.kind == Operand::kName && g.name == o.name && g.is_defined) reserve_shared(g, seen);
  }
}

void ProgramDecoder::run(const std::string& kernel) {
  const Function& f = find(kernel, 0);
  if (!f.is_entry) fail(f.line, "'%s' is not a kernel", kernel.c_str());
  out_.name = kernel;
  out_.module = &module_;
  out_.max_threads = f.max_threads, out_.required_threads = f.required_threads;
  std::unordered_map<std::string, bool> seen;
  reserve_shared(f, seen);
  out_.dynamic_shared = up(shared_end_, 128);
  for (auto& [name, at] : shared_)
    if (at == ~0ull) at = out_.dynamic_shared;
  function(kernel, f.line);
}

const Code* ProgramDecoder::function(const std::string& name, int line) {
  if (const auto known = codes_.find(name); known != codes_.end()) return known->second;
  Code& code = out_.functions.emplace_back();
  codes_[name] = &code;
  decode(find(name, line), code);
  return &code;
}

void ProgramDecoder::decode(const Function& f, Code& code) {
  Decoder::State state;
  code.name = f.name;
  for (const Register& r : f.registers) {
    const bool wide = size_of(r.type) == 8;
    state.slots.push_back(code.register_slots);
    code.register_slots += wide ? 2 : 1;
  }
  code.slots = code.register_slots;
  state.places.resize(f.variables.size());
  state.shared = function_shared_[f.name];
  for (uint64_t& at : state.shared)
    if (at == ~0ull) at = out_.dynamic_shared;
  code.local_bytes = 64;  // the lowest addresses belong to nobody
  const auto is_in = [](const std::vector<int>& list, size_t n) {
    return std::find(list.begin(), list.end(), static_cast<int>(n)) != list.end();
  };
  for (size_t n = 0; n < f.variables.size(); ++n) {
    const Variable& v = f.variables[n];
    if (v.space == "shared") continue;
    const bool is_param = f.is_entry && is_in(f.params, n);
    uint64_t& end = is_param ? out_.param_bytes : code.local_bytes;
    end = up(end, v.align);
    state.places[n] = {!is_param, end};
    end += v.size;
    if (!is_param) end = up(end, 16) + 16;  // a gap
  }
  for (const auto& [from, to] : {std::pair(&f.params, &code.params), std::pair(&f.returns, &code.returns)})
    for (const int n : *from)
      to->push_back({state.places[static_cast<size_t>(n)].at, f.variables[static_cast<size_t>(n)].size});

  // Callees are decoded behind this function's code, so its own places are taken first.
  std::vector<uint32_t> pc_of(f.body.size() + 1);
  code.entry = static_cast<uint32_t>(out_.code.size());
  uint32_t pc = code.entry;
  for (size_t n = 0; n < f.body.size(); ++n) {
    pc_of[n] = pc;
    pc += !f.body[n].opcode.empty();
  }
  pc_of.back() = pc;
  out_.code.resize(pc + 1);
  for (const auto& [name, n] : f.labels) state.labels[name] = pc_of[static_cast<size_t>(n)];

  const auto one = [&](const Statement& s, uint32_t at) {
    Decoder d;
    d.all_ = this, d.f_ = &f, d.state_ = &state, d.code_ = &code, d.s_ = &s;
    d.i.line = s.line, d.i.source = s.source;
    if (s.guard >= 0) {
      d.i.guard = static_cast<int>(state.slots[static_cast<size_t>(s.guard)]);
      d.i.guard_negated = s.guard_negated;
    }
    std::string_view rest = s.opcode;
    const auto word = [&] {
      const size_t end = std::min(rest.find('.'), rest.size());
      const std::string_view w = rest.substr(0, end);
      rest.remove_prefix(std::min(end + 1, rest.size()));
      return w;
    };
    const std::string_view base = word();
    while (!rest.empty()) d.modifiers_.push_back(word());
    const auto known = opcodes().find(base);
    if (known == opcodes().end()) d.unsupported();
    known->second(d);
    if (!d.i.run || !d.modifiers_.empty()) d.unsupported();
    out_.code[at] = d.i;
  };
  for (size_t n = 0; n < f.body.size(); ++n)
    if (!f.body[n].opcode.empty()) one(f.body[n], pc_of[n]);
  Statement end;  // what falls off the end returns; it has no line
  end.opcode = "ret";
  one(end, pc);
}

bool Decoder::take(std::string_view modifier) {
  const auto found = std::find(modifiers_.begin(), modifiers_.end(), modifier);
  if (found == modifiers_.end()) return false;
  modifiers_.erase(found);
  return true;
}

std::string_view Decoder::take_any(std::initializer_list<std::string_view> modifiers) {
  for (const std::string_view m : modifiers)
    if (take(m)) return m;
  return "";
}

bool Decoder::has(std::string_view modifier) const {
  return std::find(modifiers_.begin(), modifiers_.end(), modifier) != modifiers_.end();
}

bool Decoder::has_type() const {
  return std::any_of(modifiers_.begin(), modifiers_.end(),
                     [](auto m) { return type_named(m) != Type::kNone; });
}

Type Decoder::type() {
  for (auto m = modifiers_.begin(); m != modifiers_.end(); ++m)
    if (const Type t = type_named(*m); t != Type::kNone) {
      modifiers_.erase(m);
      return t;
    }
  unsupported("no type");
}

void Decoder::unsupported(const char* why) {
  fail(s_->line, "unsupported instruction '%s'%s%s", s_->opcode.c_str(), *why ? ": " : "", why);
}

void Decoder::expect_operands(size_t least, size_t most) {
  if (operands() < least || operands() > most)
    fail(s_->line, "'%s' with %zu operands, expected %zu to %zu", s_->opcode.c_str(), operands(), least,
         most);
}

uint32_t Decoder::register_slot(const Operand& o, Type t, bool* wide) {
  if (o.kind != Operand::kRegister) unsupported("expected a register");
  const Type is = register_type(o);
  if (wide) {
    *wide = size_of(is) == 8;
    if (is == Type::kPred) unsupported("a predicate where a value belongs");
  } else if (size_of(is) != size_of(t)) {
    fail(s_->line, "'%s': register %s has %d bytes, the instruction %d", s_->opcode.c_str(), o.name.c_str(),
         size_of(is), size_of(t));
  }
  return state_->slots[static_cast<size_t>(o.id)];
}

uint32_t Decoder::constant(Constant kind, uint64_t bits, bool wide) {
  const auto [at, is_new] = state_->constants.try_emplace({kind, wide, bits}, 0);
  if (is_new) {
    at->second = code_->slots;
    code_->constants.push_back({kind, code_->slots, bits});
    code_->slots += wide ? 2 : 1;
  }
  return at->second;
}

uint32_t Decoder::source(const Operand& o, Type t, bool* wide) {
  const int bytes = size_of(t);
  if (o.negated && t != Type::kPred) unsupported("! before a value");
  const auto bits = [&](uint64_t value) {
    if (wide) *wide = bytes == 8;
    if (t == Type::kPred) return constant(Constant::kPred, value ? ~0ull : 0, false);
    if (bytes == 8) return constant(Constant::kBits64, value, true);
    return constant(Constant::kBits32,
                    value & (bytes == 4   ? 0xffffffffu
                             : bytes == 2 ? 0xffffu
                                          : 0xffu),
                    false);
  };
  const auto variable = [&](Constant kind, uint64_t at) {
    if (bytes < 4) unsupported("an address in fewer than 32 bits");
    if (wide) *wide = bytes == 8;
    if (kind == Constant::kBits32) return bits(at);
    return constant(bytes == 8 ? Constant::kLocalAddress64 : Constant::kLocalAddress32, at, bytes == 8);
  };
  switch (o.kind) {
    case Operand::kRegister:
      return register_slot(o, t, wide);
    case Operand::kInteger:
      if (t == Type::kF32 || t == Type::kF64) unsupported("an integer where a float belongs");
      return bits(static_cast<uint64_t>(o.value));
    case Operand::kFloat32:
      if (bytes == 8)
        return bits(std::bit_cast<uint64_t>(
            static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(o.value)))));
      if (bytes != 4) unsupported("a 32-bit float where another type belongs");
      return bits(static_cast<uint64_t>(o.value));
    case Operand::kFloat64:
      if (bytes == 8) return bits(static_cast<uint64_t>(o.value));
      if (t != Type::kF32) unsupported("a double where another type belongs");
      return bits(std::bit_cast<uint32_t>(static_cast<float>(std::bit_cast<double>(o.value))));
    case Operand::kVariable: {
      const auto n = static_cast<size_t>(o.id);
      const uint64_t plus = static_cast<uint64_t>(o.value);
      if (f_->variables[n].space == "shared") return variable(Constant::kBits32, state_->shared[n] + plus);
      const Place& place = state_->places[n];
      return variable(place.is_local ? Constant::kLocalAddress64 : Constant::kBits32, place.at + plus);
    }
    case Operand::kName: {
      const uint64_t plus = static_cast<uint64_t>(o.value);
      if (const auto s = kSpecial.find(o.name); s != kSpecial.end()) {
        if (wide) *wide = bytes == 8;
        if (bytes == 8) unsupported("a special register in 64 bits");
        return constant(s->second, 0, false);  // of 16 bits: what fits
      }
      if (const auto s = all_->shared_.find(o.name); s != all_->shared_.end())
        return variable(Constant::kBits32, s->second + plus);
      if (const auto s = all_->symbols_.find(o.name); s != all_->symbols_.end()) {
        if (bytes != 8) unsupported("a global address in fewer than 64 bits");
        return variable(Constant::kBits32, s->second + plus);
      }
      fail(s_->line, "unsupported: '%s' in '%s' is no register, variable or special register known here",
           o.name.c_str(), s_->opcode.c_str());
    }
    default:
      unsupported("operand");
  }
}

Detail& Decoder::detail() {
  if (!i.detail) i.detail = &all_->out_.details.emplace_back();
  return const_cast<Detail&>(*i.detail);
}

void Decoder::address(size_t n, Space space) {
  const Operand& o = operand(n);
  if (o.kind != Operand::kAddress) unsupported("expected [address]");
  const Operand& base = o.elements[0];
  Detail& m = detail();
  m.space = space;
  m.offset = o.value;
  if (space == Space::kParam) {
    const bool is_variable = base.kind == Operand::kVariable;
    const bool is_local = is_variable ? state_->places[static_cast<size_t>(base.id)].is_local : !f_->is_entry;
    if (is_local) m.space = Space::kLocal;
  }
  i.a = source(base, Type::kB64, &i.a_wide);
}

uint32_t Decoder::label(const std::string& name) {
  for (int scope = s_->scope; scope >= 0; scope = f_->parent_scope[static_cast<size_t>(scope)])
    if (const auto at = state_->labels.find(std::to_string(scope) + " " + name); at != state_->labels.end())
      return at->second;
  fail(s_->line, "there is no label '%s'", name.c_str());
}

uint64_t Decoder::local_place(const Operand& variable) const {
  const Place& place = state_->places[static_cast<size_t>(variable.id)];
  if (!place.is_local) fail(s_->line, "'%s' is a parameter of the kernel", variable.name.c_str());
  return place.at;
}

uint32_t Decoder::label(size_t n) {
  if (operand(n).kind != Operand::kName) unsupported("expected a label");
  return label(operand(n).name);
}

const Code* Decoder::callee(const std::string& name) { return all_->function(name, s_->line); }

const std::vector<std::string>& Decoder::branch_targets(const std::string& name) const {
  for (const auto& [label, n] : f_->labels)
    if (label.ends_with(" " + name)) return f_->body[static_cast<size_t>(n)].targets;
  fail(s_->line, "there is no .branchtargets '%s'", name.c_str());
}

void Decoder::emit(Handler run, Type d, std::initializer_list<Type> sources, Rule rule) {
  if (!run) unsupported("for this type");
  expect_operands(sources.size() + 1, sources.size() + 1);
  i.run = run, i.rule = rule;
  i.bits = static_cast<uint8_t>(8 * size_of(*sources.begin()));
  i.d = dest(0, d), i.d_wide = size_of(d) == 8;
  uint32_t Inst::* const slots[] = {&Inst::a, &Inst::b, &Inst::c};
  bool Inst::* const wide[] = {&Inst::a_wide, &Inst::b_wide, &Inst::c_wide};
  size_t n = 0;
  for (const Type t : sources) i.*slots[n] = source(n + 1, t), i.*wide[n] = size_of(t) == 8, ++n;
  // A rule looks at three sources; those that are not there are the first again.
  for (; n < 3; ++n) i.*slots[n] = i.a, i.*wide[n] = i.a_wide;
}

const Code& Program::function_at(uint32_t pc) const {
  const Code* found = &functions.front();
  for (const Code& c : functions)
    if (c.entry <= pc && c.entry >= found->entry) found = &c;
  return *found;
}

std::string_view Program::text(const Inst& i) const {
  if (i.line < 1 || static_cast<size_t>(i.line) > module->lines.size()) return "";
  std::string_view text = module->lines[static_cast<size_t>(i.line) - 1];
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  return text;
}

std::unique_ptr<Program> decode(const Module& module, const std::string& kernel, const Symbols& symbols) {
  auto out = std::make_unique<Program>();
  ProgramDecoder(module, symbols, *out).run(kernel);
  return out;
}

}  // namespace ptx

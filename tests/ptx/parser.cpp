#include <cstring>
#include <utility>

#include "lexer.h"

namespace ptx {
namespace {

struct TypeName {
  std::string_view name;
  Type type;
  int bytes;
};
constexpr TypeName kTypes[] = {
    {"pred", Type::kPred, 0}, {"b8", Type::kB8, 1},         {"b16", Type::kB16, 2},
    {"b32", Type::kB32, 4},   {"b64", Type::kB64, 8},       {"u8", Type::kU8, 1},
    {"u16", Type::kU16, 2},   {"u32", Type::kU32, 4},       {"u64", Type::kU64, 8},
    {"s8", Type::kS8, 1},     {"s16", Type::kS16, 2},       {"s32", Type::kS32, 4},
    {"s64", Type::kS64, 8},   {"f16", Type::kF16, 2},       {"f16x2", Type::kF16x2, 4},
    {"bf16", Type::kBF16, 2}, {"bf16x2", Type::kBF16x2, 4}, {"tf32", Type::kTF32, 4},
    {"f32", Type::kF32, 4},   {"f64", Type::kF64, 8},
};

struct Place {
  int file, line, at_file, at_line;
  bool operator==(const Place&) const = default;
};

class Parser {
 public:
  explicit Parser(std::string_view text) : lex_(text) {}
  Module run();

 private:
  Variable variable(std::string_view space);
  void initial(Variable& v, int bytes);
  void function(bool is_entry, bool is_extern);
  std::vector<int> parameters(Function& f);
  void block(Function& f);
  void registers(Function& f);
  void local_variable(Function& f, std::string_view space);
  void location();
  void statement(Function& f);
  Operand operand(Function& f);
  Operand name();
  std::vector<Operand> list(Function& f, char end);
  Type type();

  Lexer lex_;
  Module module_;
  std::unordered_map<int, std::string> files_;
  std::vector<Place> places_;
  // Names of registers (>= 0) and variables (< 0: -1 - index), innermost { } last.
  std::vector<std::unordered_map<std::string, int>> scopes_;
  std::vector<int> scope_ids_;
  int place_ = -1;
};

Type Parser::type() {
  lex_.expect('.');
  const int line = lex_.line();
  const std::string_view word = lex_.word();
  const Type found = type_named(word);
  if (found == Type::kNone)
    fail(line, "'.%.*s' is not a type known here", static_cast<int>(word.size()), word.data());
  return found;
}

Module Parser::run() {
  while (!lex_.at_end()) {
    bool is_extern = false;
    while (lex_.accept_directive("visible") || lex_.accept_directive("weak") ||
           lex_.accept_directive("common")) {
    }
    if (lex_.accept_directive("extern")) is_extern = true;
    if (lex_.accept_directive("version") || lex_.accept_directive("address_size") ||
        lex_.accept_directive("pragma")) {
      lex_.skip_line();
    } else if (lex_.accept_directive("target")) {
      module_.target = lex_.word();
      lex_.skip_line();
    } else if (lex_.accept_directive("file")) {
      const int64_t id = lex_.number().value;
      files_[static_cast<int>(id)] = lex_.string();
      lex_.skip_line();
    } else if (lex_.accept_directive("section")) {
      lex_.accept('.');
      lex_.word();
      lex_.skip_braces();
    } else if (lex_.accept_directive("entry")) {
      function(true, is_extern);
    } else if (lex_.accept_directive("func")) {
      function(false, is_extern);
    } else {
      bool known = false;
      for (const std::string_view space : {"global", "shared", "const"}) {
        if (known || !lex_.accept_directive(space)) continue;
        module_.variables.push_back(variable(space));
        module_.variables.back().is_extern = is_extern;
        known = true;
      }
      if (!known)
        fail(lex_.line(), "unknown directive '.%s'", (lex_.accept('.'), std::string(lex_.word()).c_str()));
    }
  }
  for (const Place& place : places_) {
    const auto text = [&](int file, int line) {
      const std::string path = files_.contains(file) ? files_[file] : "?";
      return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
    };
    std::string source = text(place.file, place.line);
    if (place.at_line) source += ", inlined at " + text(place.at_file, place.at_line);
    module_.sources.push_back(std::move(source));
  }
  return std::move(module_);
}

// .align 16 .b8 name[512] = {1, 2}; what stands behind the state space.
Variable Parser::variable(std::string_view space) {
  Variable v;
  v.space = space;
  uint64_t lanes = 1;
  Type t = Type::kNone;
  while (lex_.peek() == '.') {
    if (lex_.accept_directive("align")) {
      v.align = static_cast<uint64_t>(lex_.number().value);
    } else if (lex_.accept_directive("ptr")) {  // .ptr .global .align 4: a hint
      while (lex_.peek() == '.') {
        if (lex_.accept_directive("align")) {
          lex_.number();
          break;
        }
        lex_.accept('.'), lex_.word();
      }
    } else if (lex_.accept_directive("v2")) {
      lanes = 2;
    } else if (lex_.accept_directive("v4")) {
      lanes = 4;
    } else if (lex_.accept_directive("attribute")) {
      fail(lex_.line(), ".attribute is not supported");
    } else {
      t = type();
    }
  }
  const int bytes = size_of(t);
  if (!bytes) fail(lex_.line(), "a variable needs a type with a size");
  v.name = lex_.identifier();
  v.size = static_cast<uint64_t>(bytes) * lanes;
  v.align = std::max(v.align, v.size);
  while (lex_.accept('[')) {
    const uint64_t count = lex_.peek_number() ? static_cast<uint64_t>(lex_.number().value) : 0;
    lex_.expect(']');
    if (count > (1ull << 32)) fail(lex_.line(), "'%s' is too large", v.name.c_str());
    v.size *= count;
  }
  if (lex_.accept('=')) initial(v, bytes);
  if (space != "param") lex_.expect(';');
  return v;
}

void Parser::initial(Variable& v, int bytes) {
  v.initial.reserve(v.size);
  const auto value = [&](const auto& self) -> void {
    if (lex_.accept('{')) {
      if (!lex_.accept('}')) {
        do self(self);
        while (lex_.accept(','));
        lex_.expect('}');
      }
      return;
    }
    uint64_t bits = 0;
    if (lex_.peek_number()) {
      Operand n = lex_.number();
      bits = static_cast<uint64_t>(n.value);
    } else {
      std::string symbol(lex_.identifier());
      const bool generic = symbol == "generic";
      if (generic) lex_.expect('('), symbol = lex_.identifier(), lex_.expect(')');
      uint64_t plus = 0;
      if (lex_.accept('+')) plus = static_cast<uint64_t>(lex_.number().value);
      if (bytes != 8) fail(lex_.line(), "an address in an initial value of %d bytes is not supported", bytes);
      v.pointers.push_back({v.initial.size(), plus, symbol});
    }
    const size_t at = v.initial.size();
    v.initial.resize(at + static_cast<size_t>(bytes));
    std::memcpy(v.initial.data() + at, &bits, static_cast<size_t>(bytes));
  };
  value(value);
  if (v.size == 0) v.size = v.initial.size();
  if (v.initial.size() > v.size) fail(lex_.line(), "'%s' has more initial values than room", v.name.c_str());
  v.initial.resize(v.size);
}

std::vector<int> Parser::parameters(Function& f) {
  std::vector<int> out;
  lex_.expect('(');
  if (lex_.accept(')')) return out;
  do {
    if (!lex_.accept_directive("param")) fail(lex_.line(), "a parameter in a register is not supported");
    f.variables.push_back(variable("param"));
    out.push_back(static_cast<int>(f.variables.size()) - 1);
    scopes_.back()[f.variables.back().name] = -1 - out.back();
  } while (lex_.accept(','));
  lex_.expect(')');
  return out;
}

void Parser::function(bool is_entry, bool is_extern) {
  Function f;
  f.is_entry = is_entry;
  f.line = lex_.line();
  f.parent_scope = {-1};
  scopes_.assign(1, {});
  scope_ids_ = {0};
  place_ = -1;
  if (lex_.peek() == '(') f.returns = parameters(f);
  f.name = lex_.identifier();
  if (lex_.peek() == '(') f.params = parameters(f);
  while (lex_.peek() == '.') {
    const bool required = lex_.accept_directive("reqntid");
    if (required || lex_.accept_directive("maxntid")) {
      int64_t threads = 1;
      do threads *= lex_.number().value;
      while (lex_.accept(','));
      if (threads < 1 || threads > 1024)
        fail(lex_.line(), "a block of %lld threads", static_cast<long long>(threads));
      (required ? f.required_threads : f.max_threads) = static_cast<int>(threads);
    } else if (lex_.accept_directive("minnctapersm") || lex_.accept_directive("maxnreg") ||
               lex_.accept_directive("maxclusterrank")) {
      lex_.number();
    } else if (lex_.accept_directive("noreturn")) {
    } else if (lex_.accept_directive("pragma")) {
      lex_.skip_line();
    } else {
      lex_.accept('.');
      const std::string word(lex_.word());
      fail(lex_.line(), "directive '.%s' of function '%s' is not supported", word.c_str(), f.name.c_str());
    }
  }
  if (!is_extern && lex_.peek() == '{') {
    f.is_defined = true;
    lex_.expect('{');
    block(f);
  } else {
    lex_.expect(';');
  }
  for (Function& known : module_.functions)
    if (known.name == f.name) {  // declared before it is defined
      if (f.is_defined) known = std::move(f);
      return;
    }
  module_.functions.push_back(std::move(f));
}

// Behind a {, up to its }.
void Parser::block(Function& f) {
  while (!lex_.accept('}')) {
    if (lex_.at_end()) fail(lex_.line(), "'%s' has no end", f.name.c_str());
    if (lex_.accept('{')) {
      scopes_.emplace_back();
      f.parent_scope.push_back(scope_ids_.back());
      scope_ids_.push_back(static_cast<int>(f.parent_scope.size()) - 1);
      block(f);
      scopes_.pop_back();
      scope_ids_.pop_back();
    } else if (lex_.accept_directive("reg")) {
      registers(f);
    } else if (lex_.accept_directive("loc")) {
      location();
    } else if (lex_.accept_directive("pragma")) {
      lex_.skip_line();
    } else if (lex_.peek() == '.') {
      bool known = false;
      for (const std::string_view space : {"param", "local", "shared"})
        if (!known && lex_.accept_directive(space)) local_variable(f, space), known = true;
      if (!known) fail(lex_.line(), "unknown directive in '%s'", f.name.c_str());
    } else {
      statement(f);
    }
  }
}

void Parser::local_variable(Function& f, std::string_view space) {
  f.variables.push_back(variable(space));
  if (space == "param") lex_.expect(';');
  scopes_.back()[f.variables.back().name] = -static_cast<int>(f.variables.size());
}

void Parser::registers(Function& f) {
  const Type t = type();
  const auto add = [&](std::string name) {
    scopes_.back()[name] = static_cast<int>(f.registers.size());
    f.registers.push_back({std::move(name), t});
  };
  do {
    const std::string name(lex_.identifier());
    if (lex_.accept('<')) {
      const int64_t count = lex_.number().value;
      lex_.expect('>');
      if (count < 0 || count > 1 << 20) fail(lex_.line(), "%lld registers", static_cast<long long>(count));
      for (int64_t i = 0; i < count; ++i) add(name + std::to_string(i));
    } else {
      add(name);
    }
  } while (lex_.accept(','));
  lex_.expect(';');
}

void Parser::location() {
  Place place = {};
  const auto next = [&] { return static_cast<int>(lex_.number().value); };
  const int line = lex_.line();
  place.file = next(), place.line = next(), next();
  while (lex_.line() == line && lex_.accept(',')) {  // function_name $L__info+4, inlined_at 1 2 3
    if (lex_.identifier() == "inlined_at") {
      place.at_file = next(), place.at_line = next(), next();
    } else {
      lex_.identifier();
      if (lex_.accept('+')) next();
    }
  }
  if (place.line == 0) return;  // code of no line: the last line stands
  if (places_.empty() || !(places_.back() == place)) places_.push_back(place);
  place_ = static_cast<int>(places_.size()) - 1;
}

void Parser::statement(Function& f) {
  Statement s;
  s.line = lex_.line();
  s.source = place_;
  s.scope = scope_ids_.back();
  if (lex_.accept('@')) {
    s.guard_negated = lex_.accept('!');
    const Operand guard = name();
    if (guard.kind != Operand::kRegister || f.registers[static_cast<size_t>(guard.id)].type != Type::kPred)
      fail(s.line, "a guard must be a predicate register");
    s.guard = guard.id;
  }
  s.opcode = lex_.opcode();
  if (s.guard < 0 && lex_.accept(':')) {
    f.labels.emplace_back(std::to_string(s.scope) + " " + s.opcode, static_cast<int>(f.body.size()));
    s.opcode.clear();
    if (lex_.accept_directive("branchtargets")) {
      do s.targets.emplace_back(lex_.identifier());
      while (lex_.accept(','));
      lex_.expect(';');
    }
    // Of a call through a pointer, which is refused where it stands.
    if (lex_.accept_directive("callprototype")) lex_.skip_past(';');
    f.body.push_back(std::move(s));
    return;
  }
  if (!lex_.accept(';')) {
    do s.operands.push_back(operand(f));
    while (lex_.accept(','));
    lex_.expect(';');
  }
  f.body.push_back(std::move(s));
}

std::vector<Operand> Parser::list(Function& f, char end) {
  std::vector<Operand> out;
  if (lex_.accept(end)) return out;
  do out.push_back(operand(f));
  while (lex_.accept(','));
  lex_.expect(end);
  return out;
}

Operand Parser::operand(Function& f) {
  Operand out;
  if (lex_.accept('{') || lex_.peek() == '(') {
    out.kind = Operand::kVector;
    out.elements = lex_.accept('(') ? list(f, ')') : list(f, '}');
  } else if (lex_.accept('[')) {
    out.kind = Operand::kAddress;
    out.elements = {lex_.peek_number() ? lex_.number() : name()};
    out.value = std::exchange(out.elements[0].value, 0);
    if (lex_.accept('+'))
      out.value += lex_.number().value;
    else if (lex_.peek() == '-')
      out.value += lex_.number().value;
    lex_.expect(']');
  } else if (lex_.peek_number()) {
    out = lex_.number();
  } else if (lex_.accept('!')) {
    out = name();
    out.negated = true;
  } else {
    out = name();
    if (lex_.accept('|')) {
      Operand pair;
      pair.kind = Operand::kPair;
      pair.elements = {std::move(out), name()};
      return pair;
    }
    if (out.kind != Operand::kRegister && out.kind != Operand::kSink)
      while (lex_.accept('+')) out.value += lex_.number().value;
  }
  return out;
}

Operand Parser::name() {
  Operand out;
  out.name = lex_.identifier();
  if (out.name == "_") return out;
  out.kind = Operand::kName;
  for (size_t i = scopes_.size(); i-- > 0;) {
    const auto found = scopes_[i].find(out.name);
    if (found == scopes_[i].end()) continue;
    out.kind = found->second >= 0 ? Operand::kRegister : Operand::kVariable;
    out.id = found->second >= 0 ? found->second : -1 - found->second;
    break;
  }
  return out;
}

}  // namespace

Type type_named(std::string_view name) {
  for (const TypeName& t : kTypes)
    if (t.name == name) return t.type;
  return Type::kNone;
}

int size_of(Type type) {
  for (const TypeName& t : kTypes)
    if (t.type == type) return t.bytes;
  return 0;
}

Module parse(std::string_view text) {
  Module out = Parser(text).run();
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    out.lines.emplace_back(text.substr(at, end - at));
    at = end + 1;
  }
  return out;
}

}  // namespace ptx

// What an instruction's decoder sees: its modifiers and operands, and the instruction it fills in.
#pragma once

#include <initializer_list>
#include <map>
#include <tuple>

#include "program.h"

namespace ptx {

class Decoder;
using Opcodes = std::unordered_map<std::string_view, void (*)(Decoder&)>;
void add_integer(Opcodes&);
void add_bits(Opcodes&);
void add_float(Opcodes&);
void add_approx(Opcodes&);
void add_convert(Opcodes&);
void add_compare(Opcodes&);
void add_move(Opcodes&);
void add_memory(Opcodes&);
void add_atomic(Opcodes&);
void add_async(Opcodes&);
void add_matrix(Opcodes&);
void add_warp(Opcodes&);
void add_control(Opcodes&);

// Reads one statement. A modifier that nobody takes is an error, so that none is ever ignored in silence.
class Decoder {
 public:
  Inst i;

  bool take(std::string_view modifier);
  std::string_view take_any(
      std::initializer_list<std::string_view> modifiers);  // "" where there is none of them
  Type type();                                             // the next type among the modifiers
  bool has(std::string_view modifier) const;
  bool has_type() const;
  [[noreturn]] void unsupported(const char* why = "");
  void expect_operands(size_t least, size_t most);
  size_t operands() const { return s_->operands.size(); }
  const Operand& operand(size_t n) const { return s_->operands[n]; }
  const std::string& opcode() const { return s_->opcode; }
  int line() const { return s_->line; }

  // The slot of an operand. A register must have the type's size, unless `wide` is given, which then tells
  // its own.
  uint32_t dest(size_t n, Type t) { return register_slot(operand(n), t, nullptr); }
  uint32_t source(size_t n, Type t) { return source(operand(n), t, nullptr); }
  uint32_t source(const Operand& o, Type t, bool* wide);
  uint32_t register_slot(const Operand& o, Type t, bool* wide);
  Type register_type(const Operand& o) const { return f_->registers[static_cast<size_t>(o.id)].type; }
  uint32_t constant(Constant kind, uint64_t bits, bool wide);
  bool negated(size_t n) const { return operand(n).negated; }
  // Base slot in i.a, offset and space in the detail.
  void address(size_t n, Space space);
  uint64_t local_place(const Operand& variable) const;
  uint32_t label(size_t n);
  uint32_t label(const std::string& name);
  const Code* callee(const std::string& name);
  const std::vector<std::string>& branch_targets(const std::string& name) const;
  Detail& detail();

  // d = op(a), op(a, b), op(a, b, c), all of one type unless told otherwise.
  void emit(Handler run, Type d, std::initializer_list<Type> sources, Rule rule = Rule::kAll);
  void emit(Handler run) { i.run = run; }

 private:
  friend class ProgramDecoder;
  struct Place {
    bool is_local;  // in local memory; else in the kernel's parameters
    uint64_t at;
  };
  struct State {                  // of the function at hand
    std::vector<uint32_t> slots;  // of its registers
    std::vector<Place> places;    // of its variables that are not shared
    std::vector<uint64_t> shared;
    std::map<std::tuple<Constant, bool, uint64_t>, uint32_t> constants;
    std::unordered_map<std::string, uint32_t> labels;
  };

  class ProgramDecoder* all_ = nullptr;
  const Function* f_ = nullptr;
  State* state_ = nullptr;
  Code* code_ = nullptr;
  const Statement* s_ = nullptr;
  std::vector<std::string_view> modifiers_;
};

}  // namespace ptx

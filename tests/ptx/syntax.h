// A PTX module as written: declarations and statements with their lines. Nothing here knows what an
// instruction does. Grammar: NVIDIA's "PTX ISA", chapters 4 and 5.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace ptx {

// Text that is not PTX, or PTX that this interpreter does not execute. The message names the line.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn, gnu::format(printf, 2, 3)]] void fail(int line, const char* format, ...);

enum class Type : uint8_t {
  kNone,
  kPred,
  kB8,
  kB16,
  kB32,
  kB64,
  kU8,
  kU16,
  kU32,
  kU64,
  kS8,
  kS16,
  kS32,
  kS64,
  kF16,
  kF16x2,
  kBF16,
  kBF16x2,
  kTF32,
  kF32,
  kF64,
};
Type type_named(std::string_view name);  // kNone for a word that is not a type
int size_of(Type type);                  // bytes; 0 for a predicate

struct Operand {
  enum Kind : uint8_t {
    kName,
    kRegister,
    kVariable,
    kInteger,
    kFloat32,
    kFloat64,
    kAddress,
    kVector,
    kPair,
    kSink
  };
  Kind kind = kSink;
  bool negated = false;           // !p
  int id = -1;                    // register or variable of the function
  int64_t value = 0;              // an integer, a float's bits, or what is added to a symbol or an address
  std::string name;               // label, function, module variable or special register
  std::vector<Operand> elements;  // of a vector or pair; the base of an address
};

struct Variable {
  std::string name;
  std::string_view space;  // param, shared, global, const, local
  uint64_t size = 0, align = 1;
  bool is_extern = false;
  std::vector<uint8_t> initial;
  struct Pointer {
    uint64_t at, plus;
    std::string symbol;
  };
  std::vector<Pointer> pointers;  // addresses of other variables within the initial value
};

struct Statement {
  int line = 0, source = -1;  // source: index in Module::sources
  int scope = 0;
  std::string opcode;  // empty: a label
  int guard = -1;
  bool guard_negated = false;
  std::vector<Operand> operands;
  std::vector<std::string> targets;  // of a .branchtargets label
};

struct Register {
  std::string name;
  Type type;
};

struct Function {
  std::string name;
  int line = 0;
  bool is_entry = false, is_defined = false;
  std::vector<int> params, returns;  // variables
  std::vector<Variable> variables;
  std::vector<Register> registers;
  std::vector<Statement> body;
  std::vector<int> parent_scope;                    // of each { }
  std::vector<std::pair<std::string, int>> labels;  // "scope name" -> statement
  int max_threads = 0, required_threads = 0;
};

struct Module {
  std::string target;
  std::vector<std::string> sources;  // "file.cu:12", with ", inlined at file.cu:40" where it was
  std::vector<Variable> variables;
  std::vector<Function> functions;
  std::vector<std::string> lines;  // of the text, for reports
};

Module parse(std::string_view text);

}  // namespace ptx

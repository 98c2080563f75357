// PTX text as tokens.
#pragma once

#include <string>
#include <string_view>

#include "syntax.h"

namespace ptx {

class Lexer {
 public:
  explicit Lexer(std::string_view text) : text_(text) {}

  int line() { return skip(), line_; }
  bool at_end() { return skip(), at_ == text_.size(); }
  char peek() { return skip(), at_ < text_.size() ? text_[at_] : '\0'; }
  bool accept(char c);
  void expect(char c);
  bool peek_number();
  std::string_view identifier();                 // with a leading % or $, and .x of %tid.x
  std::string_view word();                       // what follows a '.': reg, v2, L1::no_allocate
  std::string_view opcode();                     // ld.global.L1::no_allocate.v4.b32, or a label's name
  bool accept_directive(std::string_view name);  // ".reg"
  Operand number();
  std::string string();
  void skip_line();
  void skip_past(char c);
  void skip_braces();  // a balanced { }

 private:
  void skip();  // white space and comments

  std::string_view text_;
  size_t at_ = 0;
  int line_ = 1;
};

}  // namespace ptx

#include "lexer.h"

#include <bit>
#include <cctype>
#include <charconv>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace ptx {

void fail(int line, const char* format, ...) {
  char text[1024];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  throw Error("PTX line " + std::to_string(line) + ": " + text);
}

namespace {
bool is_name(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}
}  // namespace

void Lexer::skip() {
  while (at_ < text_.size()) {
    const std::string_view rest = text_.substr(at_);
    if (rest[0] == '\n') {
      ++line_, ++at_;
    } else if (std::isspace(static_cast<unsigned char>(rest[0]))) {
      ++at_;
    } else if (rest.starts_with("//")) {
      at_ = std::min(text_.find('\n', at_), text_.size());
    } else if (rest.starts_with("/*")) {
      const size_t end = text_.find("*/", at_ + 2);
      if (end == text_.npos) fail(line_, "a comment without end");
      for (; at_ < end + 2; ++at_) line_ += text_[at_] == '\n';
    } else {
      return;
    }
  }
}

bool Lexer::accept(char c) {
  if (peek() != c) return false;
  ++at_;
  return true;
}

void Lexer::expect(char c) {
  if (accept(c)) return;
  const std::string_view rest = text_.substr(at_, 20);
  fail(line_, "expected '%c', got '%.*s'", c, static_cast<int>(rest.size()), rest.data());
}

bool Lexer::peek_number() {
  const char c = peek();
  return std::isdigit(static_cast<unsigned char>(c)) || c == '-';
}

std::string_view Lexer::identifier() {
  skip();
  const size_t start = at_;
  while (at_ < text_.size() && is_name(text_[at_])) ++at_;
  if (at_ == start)
    fail(line_, "expected a name, got '%.*s'", 20, std::string(text_.substr(at_, 20)).c_str());
  const char kind = at_ + 1 < text_.size() && text_[at_] == '.' ? text_[at_ + 1] : '\0';
  if (kind >= 'w' && kind <= 'z' && text_[start] == '%' &&
      (at_ + 2 == text_.size() || !is_name(text_[at_ + 2])))
    at_ += 2;
  return text_.substr(start, at_ - start);
}

std::string_view Lexer::word() {
  skip();
  const size_t start = at_;
  while (at_ < text_.size()) {
    if (is_name(text_[at_])) {
      ++at_;
    } else if (text_.substr(at_, 2) == "::") {
      at_ += 2;
    } else {
      break;
    }
  }
  return text_.substr(start, at_ - start);
}

std::string_view Lexer::opcode() {
  skip();
  const size_t start = at_;
  word();
  while (at_ < text_.size() && text_[at_] == '.') ++at_, word();
  if (at_ == start)
    fail(line_, "expected an instruction, got '%s'", std::string(text_.substr(at_, 20)).c_str());
  return text_.substr(start, at_ - start);
}

bool Lexer::accept_directive(std::string_view name) {
  if (peek() != '.' || !text_.substr(at_ + 1).starts_with(name)) return false;
  const size_t end = at_ + 1 + name.size();
  if (end < text_.size() && (is_name(text_[end]) || text_[end] == ':')) return false;
  at_ = end;
  return true;
}

Operand Lexer::number() {
  skip();
  Operand out;
  out.kind = Operand::kInteger;
  const bool minus = accept('-');
  skip();
  const std::string_view rest = text_.substr(at_);
  const auto digits = [&](size_t skipped, int base, size_t most = 64) {
    uint64_t value = 0;
    const char* first = rest.data() + skipped;
    const auto [end, error] =
        std::from_chars(first, rest.data() + std::min(rest.size(), skipped + most), value, base);
    if (end == first || error != std::errc())
      fail(line_, "'%s' is not a number of 64 bits", std::string(rest.substr(0, 24)).c_str());
    at_ += static_cast<size_t>(end - rest.data());
    return value;
  };
  uint64_t value;
  if (rest.starts_with("0f") || rest.starts_with("0F")) {
    value = digits(2, 16, 8), out.kind = Operand::kFloat32;
    if (minus) value ^= 0x80000000u;
  } else if (rest.starts_with("0d") || rest.starts_with("0D")) {
    value = digits(2, 16, 16), out.kind = Operand::kFloat64;
    if (minus) value ^= 1ull << 63;
  } else if (rest.starts_with("0x") || rest.starts_with("0X")) {
    value = digits(2, 16);
  } else if (rest.starts_with("0b") || rest.starts_with("0B")) {
    value = digits(2, 2);
  } else {
    size_t end = 0;
    while (end < rest.size() && std::isdigit(static_cast<unsigned char>(rest[end]))) ++end;
    if (end < rest.size() && (rest[end] == '.' || rest[end] == 'e')) {  // a double, decimal
      const std::string text(rest.substr(0, 64));
      char* stop;
      value = std::bit_cast<uint64_t>(std::strtod(text.c_str(), &stop));
      at_ += static_cast<size_t>(stop - text.c_str()), out.kind = Operand::kFloat64;
      if (minus) value ^= 1ull << 63;
    } else {
      value = end > 1 && rest[0] == '0' ? digits(1, 8) : digits(0, 10);
    }
  }
  if (out.kind == Operand::kInteger) {
    if (at_ < text_.size() && text_[at_] == 'U') ++at_;
    if (minus) value = 0 - value;
  }
  out.value = static_cast<int64_t>(value);
  return out;
}

std::string Lexer::string() {
  expect('"');
  const size_t start = at_;
  while (at_ < text_.size() && text_[at_] != '"') at_ += text_[at_] == '\\' ? 2 : 1;
  if (at_ >= text_.size()) fail(line_, "a string without end");
  return std::string(text_.substr(start, at_++ - start));
}

void Lexer::skip_line() { at_ = std::min(text_.find('\n', at_), text_.size()); }

void Lexer::skip_past(char c) {
  while (!accept(c)) {
    if (at_end()) fail(line_, "expected '%c'", c);
    ++at_;
  }
}

void Lexer::skip_braces() {
  expect('{');
  for (int depth = 1; depth; ++at_) {
    if (at_end()) fail(line_, "a { without }");
    depth += (text_[at_] == '{') - (text_[at_] == '}');
  }
}

}  // namespace ptx

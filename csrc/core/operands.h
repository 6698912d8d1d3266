// How operators take their operands. RK_OPERANDS(Struct, "operator", LIST) makes of one list, in the order of
// the schema, a struct that takes the operands off torch's stack; implement<&function>(m) registers a
// function of that struct. No operand list stands anywhere else in C++: tests/build compares the lists with
// the schemas in Python.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "core/tensor_view.h"

namespace rk {

using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

namespace detail {

template <typename>
struct IsTuple : std::false_type {};
template <typename... T>
struct IsTuple<std::tuple<T...>> : std::true_type {};

template <typename... T>
void put(StableIValue* stack, const std::tuple<T...>& results) {
  torch::stable::detail::box_from_tuple<T...>(stack, results);
}

template <auto function>
struct Boxed;

template <typename Result, typename Operands, Result (*function)(const Operands&)>
struct Boxed<function> {
  using Taken = Operands;

  static void call(StableIValue* stack, uint64_t count, uint64_t) {
    check(count == Operands::count, "the schema of ", Operands::name, " has ", count,
          " operands, but the kernel takes ", Operands::count);
    const Operands operands = Operands::from(stack);
    if constexpr (std::is_void_v<Result>) {
      function(operands);
    } else if constexpr (IsTuple<Result>::value) {
      put(stack, function(operands));
    } else {
      stack[0] = torch::stable::detail::from(function(operands));
    }
  }
};

}  // namespace detail

// Registers a function for the operator of its operands, or for another one with the same operands.
template <auto function, typename Library>
void implement(Library& library, const char* name = detail::Boxed<function>::Taken::name) {
  library.impl(name, &detail::Boxed<function>::call);
}

}  // namespace rk

#define RK_OPERAND_FIELD(Type, name) Type name;
#define RK_OPERAND_COUNT(Type, name) +1
// A list in braces is evaluated from left to right.
#define RK_OPERAND_TAKE(Type, name) torch::stable::detail::to<Type>(*next++),

#define RK_OPERANDS(Struct, operator_name, LIST)                               \
  struct Struct {                                                              \
    LIST(RK_OPERAND_FIELD)                                                     \
    static constexpr const char* name = operator_name;                         \
    static constexpr uint64_t count = 0 LIST(RK_OPERAND_COUNT);                \
    static Struct from(StableIValue* next) { return {LIST(RK_OPERAND_TAKE)}; } \
  };

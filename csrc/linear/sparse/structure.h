// The checked places of the kept weights of a layer.
#pragma once

#include <cstdint>
#include <vector>

#include "linear/operands.h"

namespace rk {

// Kept weights as blocks, checked: what is wrong is named with its position.
class Structure {
 public:
  int64_t n, k, rows = 1, columns = 1;
  std::vector<int32_t> crow, col;

  int64_t blocks() const { return static_cast<int64_t>(col.size()); }

  Structure(const Tensor& crow_arg, const Tensor& col_arg, int64_t n_arg, int64_t k_arg, int64_t rows_arg,
            int64_t columns_arg)
      : n(n_arg), k(k_arg), rows(rows_arg), columns(columns_arg) {
    check(n >= 1 && n <= INT32_MAX - 64, "out_features must be 1 to ", INT32_MAX - 64, ", but is ", n);
    check(k >= 1 && k <= INT32_MAX - 64, "in_features must be 1 to ", INT32_MAX - 64, ", but is ", k);
    if (rows == 0) {
      two_of_four(crow_arg, col_arg);
    } else {
      check(rows >= 1 && columns >= 1, "blocks must have at least one row and one column, but have ", rows,
            " and ", columns);
      blocks_of(Integers(crow_arg, "crow_indices"), Integers(col_arg, "col_indices"));
    }
  }

 private:
  void two_of_four(const Tensor& crow_arg, const Tensor& col_arg) {
    check_cpu(col_arg, "col_indices");
    check(crow_arg.numel() == 0, "crow_indices of a 2:4 layer must be empty, but has ", crow_arg.numel(),
          " values");
    check(col_arg.scalar_type() == ScalarType::Byte && col_arg.dim() == 2,
          "col_indices of a 2:4 layer must be a uint8 matrix");
    const int64_t fours = (k + 3) / 4, bytes = (k + 7) / 8;
    check(2 * n * fours <= INT32_MAX, "a layer can keep at most ", INT32_MAX, " weights");
    check(col_arg.size(0) == n && col_arg.size(1) == bytes, "col_indices of a 2:4 layer must have shape [", n,
          ", ", bytes, "], but has [", col_arg.size(0), ", ", col_arg.size(1), "]");
    const Tensor kept = col_arg.is_contiguous() ? col_arg : torch::stable::contiguous(col_arg);
    const uint8_t* metadata = static_cast<const uint8_t*>(kept.data_ptr());
    rows = columns = 1;
    crow.reserve(static_cast<size_t>(n) + 1);
    col.reserve(static_cast<size_t>(2 * n * fours));
    for (int64_t row = 0; row <= n; ++row) crow.push_back(static_cast<int32_t>(2 * fours * row));
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t four = 0; four < fours; ++four) {
        const int half = metadata[row * bytes + four / 2] >> (four % 2 * 4) & 15, low = half & 3,
                  high = half >> 2;
        check(low < high, "col_indices of a 2:4 layer holds the positions ", low, " and ", high,
              " for the columns ", 4 * four, " to ", 4 * four + 3, " of row ", row,
              ", but the first must be below the second");
        col.push_back(static_cast<int32_t>(4 * four + low));
        col.push_back(static_cast<int32_t>(4 * four + high));
      }
    }
  }

  void blocks_of(const Integers& crow_arg, const Integers& col_arg) {
    const auto at = [](const Integers& x, int64_t i) {
      return x.is_64 ? static_cast<const int64_t*>(x.data)[i] : static_cast<const int32_t*>(x.data)[i];
    };
    const int64_t block_rows = (n + rows - 1) / rows, block_columns = (k + columns - 1) / columns;
    check(crow_arg.count == block_rows + 1, "crow_indices must have ", block_rows + 1, " values, but has ",
          crow_arg.count);
    check(at(crow_arg, 0) == 0, "crow_indices[0] must be 0, but is ", at(crow_arg, 0));
    for (int64_t r = 0; r < block_rows; ++r) {
      check(at(crow_arg, r + 1) >= at(crow_arg, r), "crow_indices[", r + 1, "] is ", at(crow_arg, r + 1),
            ", but must not be below the ", at(crow_arg, r), " before it");
    }
    check(at(crow_arg, block_rows) == col_arg.count, "crow_indices[", block_rows, "] is ",
          at(crow_arg, block_rows), ", but must be the number of col_indices, ", col_arg.count);
    check(col_arg.count * rows * columns <= INT32_MAX, "a layer can keep at most ", INT32_MAX, " weights");
    crow.resize(static_cast<size_t>(block_rows) + 1);
    for (int64_t r = 0; r <= block_rows; ++r) crow[r] = static_cast<int32_t>(at(crow_arg, r));
    col.resize(static_cast<size_t>(col_arg.count));
    col_arg.is_64 ? take_columns(static_cast<const int64_t*>(col_arg.data), block_rows, block_columns)
                  : take_columns(static_cast<const int32_t*>(col_arg.data), block_rows, block_columns);
  }

  template <typename Index>
  void take_columns(const Index* given, int64_t block_rows, int64_t block_columns) {
    for (int64_t r = 0; r < block_rows; ++r) {
      int64_t before = -1;
      for (int64_t i = crow[r]; i < crow[r + 1]; ++i) {
        const int64_t c = given[i];
        if (c <= before || c >= block_columns) refuse_column(r, i, c, before, block_columns);
        before = c;
        col[i] = static_cast<int32_t>(c);
      }
    }
  }

  [[noreturn]] static void refuse_column(int64_t row, int64_t i, int64_t c, int64_t before, int64_t columns) {
    if (c < 0 || c >= columns) {
      raise<std::out_of_range>("col_indices[", i, "] is ", c, " in row ", row, ", but must be 0 to ",
                               columns - 1);
    }
    check(c != before, "col_indices[", i, "] is ", c, " in row ", row, " for the second time");
    raise<std::runtime_error>("col_indices[", i, "] is ", c, " in row ", row, ", but must be above the ",
                              before, " before it");
  }
};

}  // namespace rk

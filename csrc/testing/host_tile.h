// The tiles of cuda/tile.h on the host: the 16 x 16 elements of a tile are spread over the lanes
// of a warp (in an order of our own, as CUDA leaves it open), and meet when they are multiplied.
#pragma once

#include "cuda/device.h"

namespace latentguard::cuda {

struct Rows {};
struct Columns {};

template <typename T>
struct Tile {
  static constexpr int kStep = 16;
  static constexpr int kParts = 1;
};
template <>
struct Tile<float> {
  static constexpr int kStep = 8;
  static constexpr int kParts = 2;
};

// Lane l holds elements l * kShare .. of the operand, element (i, k) at i * kStep + k.
template <typename T>
constexpr int kShare = 16 * Tile<T>::kStep / 32;

template <typename T>
struct TileA {
  float part[Tile<T>::kParts][kShare<T>];
};
template <typename T, typename Order>
struct TileB {
  float part[Tile<T>::kParts][kShare<T>];
};

inline int tile_lane() { return host::thread_index() % 32; }

template <typename T>
struct TileC {
  float part[8];
  void clear() { std::fill(part, part + 8, 0.f); }
  void load(Shared<float> from, int offset, int stride, LG_HERE) {
    from.check_tile(offset, stride, file, line);
    for (int i = 0; i < 8; ++i) part[i] = from.get(place(offset, stride, i), file, line);
  }
  void store(Shared<float> to, int offset, int stride, LG_HERE) const {
    to.check_tile(offset, stride, file, line);
    for (int i = 0; i < 8; ++i) to.set(place(offset, stride, i), part[i], file, line);
  }

 private:
  static int place(int offset, int stride, int i) {
    const int element = tile_lane() * 8 + i;
    return offset + element / 16 * stride + element % 16;
  }
};

// Rounds to TF32: 10 bits of mantissa, to nearest, ties away from zero (cvt.rna).
inline float to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return x;
  return __uint_as_float((bits + 0x1000u) & 0xffffe000u);
}

template <typename T, typename Operand>
void take(Operand& operand, int i, T value) {
  const float x = to_float(value);
  if constexpr (Tile<T>::kParts == 2) {
    operand.part[0][i] = to_tf32(x);
    operand.part[1][i] = to_tf32(x - operand.part[0][i]);
  } else {
    operand.part[0][i] = x;
  }
}

template <typename T>
void load_tile(TileA<T>& a, Shared<T> from, int offset, int stride, LG_HERE) {
  from.check_tile(offset, stride, file, line);
  for (int i = 0; i < kShare<T>; ++i) {
    const int element = tile_lane() * kShare<T> + i;
    const int row = element / Tile<T>::kStep, k = element % Tile<T>::kStep;
    take<T>(a, i, from.get(offset + row * stride + k, file, line));
  }
}
template <typename T, typename Order>
void load_tile(TileB<T, Order>& b, Shared<T> from, int offset, int stride, LG_HERE) {
  from.check_tile(offset, stride, file, line);
  for (int i = 0; i < kShare<T>; ++i) {
    const int element = tile_lane() * kShare<T> + i;
    const int column = element / Tile<T>::kStep, k = element % Tile<T>::kStep;
    const bool columns = std::is_same_v<Order, Columns>;
    const int at = columns ? column * stride + k : k * stride + column;
    take<T>(b, i, from.get(offset + at, file, line));
  }
}

template <typename T, typename Order>
void multiply(TileC<T>& c, const TileA<T>& a, const TileB<T, Order>& b, LG_HERE) {
  struct Both {
    TileA<T> a;
    TileB<T, Order> b;
  };
  static_assert(sizeof(Both) <= host::kSlot);
  const Both mine{a, b};
  const unsigned char* slots = host::warp_exchange(&mine, sizeof(mine), file, line);
  const auto of_lane = [&](int lane) {
    return reinterpret_cast<const Both*>(slots + lane * host::kSlot);
  };
  constexpr int kStep = Tile<T>::kStep;
  for (int i = 0; i < 8; ++i) {
    const int row = (tile_lane() * 8 + i) / 16, column = (tile_lane() * 8 + i) % 16;
    for (int k = 0; k < kStep; ++k) {
      const int left = row * kStep + k, right = column * kStep + k;
      const auto& x = of_lane(left / kShare<T>)->a.part;
      const auto& y = of_lane(right / kShare<T>)->b.part;
      const int l = left % kShare<T>, r = right % kShare<T>;
      if constexpr (Tile<T>::kParts == 2) {
        c.part[i] += x[1][l] * y[0][r];
        c.part[i] += x[0][l] * y[1][r];
      }
      c.part[i] += x[0][l] * y[0][r];
    }
  }
}

}  // namespace latentguard::cuda

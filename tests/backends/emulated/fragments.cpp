// Which element of a matrix lies in which register of which lane: the emulator's maps against the words of the PTX ISA
// (9.7.14, "Matrix Fragments for mma.m16n8k16 with floating point type", "ldmatrix"), and against CuTe's where its
// headers are there.
#include <cstdio>
#include <cstring>
#include <random>

#include "emulate.h"

#if __has_include(<cute/atom/mma_traits_sm80.hpp>)
#include <cute/tensor.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#endif

namespace {

// The manual's groupID = lane >> 2 and threadID_in_group = lane % 4, as it writes them.
int row_of_a(int lane, int i) {
    const int group = lane >> 2;
    return (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
}
int column_of_a(int lane, int i) {
    return i < 4 ? (lane % 4) * 2 + (i & 1) : (lane % 4) * 2 + (i & 1) + 8;
}
int row_of_b(int lane, int i) {
    return i < 2 ? (lane % 4) * 2 + (i & 1) : (lane % 4) * 2 + (i & 1) + 8;
}
int column_of_b(int lane, int) {
    return lane >> 2;
}
int row_of_c(int lane, int i) {
    return i < 2 ? lane >> 2 : (lane >> 2) + 8;
}
int column_of_c(int lane, int i) {
    return (lane % 4) * 2 + (i & 1);
}

// Small integers: every product and sum is exact.
int wrong_products() {
    std::mt19937 rng(1);
    float a[16][16], b[16][8], c[16][8];
    const auto fill = [&](auto& x) {
        for (auto& row : x)
            for (float& one : row) one = float(int(rng() % 15) - 7);
    };
    fill(a), fill(b), fill(c);
    emulate::Lanes in = {};
    uint32_t out[32][4];
    for (int lane = 0; lane < 32; lane++) {
        const auto put = [&](int word, int i, float x) {
            in[lane][word + i / 2] |= uint32_t(emulate::float_to_half(x)) << 16 * (i % 2);
        };
        for (int i = 0; i < 8; i++) put(0, i, a[row_of_a(lane, i)][column_of_a(lane, i)]);
        for (int i = 0; i < 4; i++) put(4, i, b[row_of_b(lane, i)][column_of_b(lane, i)]);
        for (int i = 0; i < 4; i++) std::memcpy(&in[lane][6 + i], &c[row_of_c(lane, i)][column_of_c(lane, i)], 4);
    }
    emulate::execute(emulate::Kind::mma_half, in, out);
    int wrong = 0;
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            const int m = row_of_c(lane, i), n = column_of_c(lane, i);
            float expected = c[m][n], got;
            for (int k = 0; k < 16; k++) expected += a[m][k] * b[k][n];
            std::memcpy(&got, &out[lane][i], 4);
            wrong += got != expected;
        }
    return wrong;
}

// Thread i of ldmatrix names row i % 8 of matrix i / 8, and gets elements 2 (i % 4) and one more of row i / 4 of each;
// transposed, of each column.
int wrong_loads(bool transposed) {
    emulate::Lanes in = {};
    uint32_t out[32][4];
    for (int lane = 0; lane < 32; lane++) {
        for (int c = 0; c < 8; c++) in[lane][c / 2] |= uint32_t(lane * 8 + c) << 16 * (c % 2);
        in[lane][4] = lane * 16;
    }
    emulate::execute(transposed ? emulate::Kind::ldmatrix_trans : emulate::Kind::ldmatrix, in, out);
    int wrong = 0;
    for (int lane = 0; lane < 32; lane++)
        for (int m = 0; m < 4; m++)
            for (int i = 0; i < 2; i++) {
                const uint32_t row = lane / 4, column = lane % 4 * 2 + i;
                const uint32_t expected = m * 64 + (transposed ? column * 8 + row : row * 8 + column);
                wrong += (out[lane][m] >> 16 * i & 0xffff) != expected;
            }
    return wrong;
}

#if __has_include(<cute/atom/mma_traits_sm80.hpp>)
int differ_from_cute() {
    using Traits = cute::MMA_Traits<cute::SM80_16x8x16_F32F16F16F32_TN>;  // indices run down columns
    int wrong = 0;
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 8; i++)
            wrong += Traits::ALayout{}(lane, i) != row_of_a(lane, i) + 16 * column_of_a(lane, i);
        for (int i = 0; i < 4; i++) {
            wrong += Traits::BLayout{}(lane, i) != column_of_b(lane, i) + 8 * row_of_b(lane, i);
            wrong += Traits::CLayout{}(lane, i) != row_of_c(lane, i) + 16 * column_of_c(lane, i);
        }
    }
    return wrong;
}
#endif

}  // namespace

namespace emulate {
Stats stats;
}

int main() {
    const int products = wrong_products(), loads = wrong_loads(false), transposed = wrong_loads(true);
    printf("mma %d ldmatrix %d transposed %d", products, loads, transposed);
    int cute = 0;
#if __has_include(<cute/atom/mma_traits_sm80.hpp>)
    cute = differ_from_cute();
    printf(" cute %d", cute);
#endif
    printf("\n");
    return products || loads || transposed || cute;
}

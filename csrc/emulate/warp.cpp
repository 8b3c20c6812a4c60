// The instructions that the lanes of a warp execute together. The fragment maps are those of the PTX ISA, "Matrix
// Fragments for mma.m16n8k16 with floating point type" and "ldmatrix": lane l holds row l / 4 and columns 2 (l % 4) and
// one more of each 8x8 matrix.
#include <cstring>

#include "emulate.h"

namespace emulate {

namespace {

void multiply(bool half, const Lanes& in, uint32_t (&out)[32][4]) {
    float a[16][16], b[16][8], d[16][8] = {};
    const auto value = [half](uint16_t x) { return half ? half_to_float(x) : bfloat_to_float(x); };
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 2; i++) {
            const int r = l / 4, c = l % 4 * 2 + i;
            const auto number = [&](int word) { return value(static_cast<uint16_t>(in[l][word] >> 16 * i)); };
            a[r][c] = number(0);
            a[r + 8][c] = number(1);
            a[r][c + 8] = number(2);
            a[r + 8][c + 8] = number(3);
            b[c][r] = number(4);
            b[c + 8][r] = number(5);
        }
    for (int k = 0; k < 16; k++)
        for (int m = 0; m < 16; m++)
            for (int n = 0; n < 8; n++)
                d[m][n] += a[m][k] * b[k][n];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) {
            float sum;
            std::memcpy(&sum, &in[l][6 + i], 4);
            sum += d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
            std::memcpy(&out[l][i], &sum, 4);
        }
}

void load_matrices(bool transposed, const Lanes& in, uint32_t (&out)[32][4]) {
    for (int m = 0; m < 4; m++) {
        uint16_t x[8][8];
        unsigned banks = 0;  // groups of four, which 16 bytes take
        for (int r = 0; r < 8; r++) {
            for (int c = 0; c < 8; c++)
                x[r][c] = static_cast<uint16_t>(in[m * 8 + r][c / 2] >> 16 * (c % 2));
            const unsigned bank = 1u << in[m * 8 + r][4] / 16 % 8;
            stats.conflicts += (banks & bank) != 0;
            banks |= bank;
        }
        for (int l = 0; l < 32; l++) {
            const int r = l / 4, c = l % 4 * 2;
            out[l][m] = transposed ? x[c][r] | uint32_t(x[c + 1][r]) << 16 : x[r][c] | uint32_t(x[r][c + 1]) << 16;
        }
    }
}

}  // namespace

void execute(Kind kind, const Lanes& in, uint32_t (&out)[32][4]) {
    if (kind == Kind::shuffle) {
        stats.shuffles++;
        for (int l = 0; l < 32; l++)
            out[l][0] = in[(l ^ in[l][1]) % 32][0];
    } else if (kind == Kind::mma_half || kind == Kind::mma_bfloat) {
        stats.mma++;
        multiply(kind == Kind::mma_half, in, out);
    } else {
        stats.ldmatrix++;
        load_matrices(kind == Kind::ldmatrix_trans, in, out);
    }
}

float bfloat_to_float(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
float half_to_float(uint16_t x) {
    _Float16 h;
    std::memcpy(&h, &x, 2);
    return static_cast<float>(h);
}
uint16_t float_to_half(float x) {
    const _Float16 h = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &h, 2);
    return bits;
}
uint16_t float_to_bfloat(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulate

// A GPU for tests, of one CPU thread: every CUDA thread is a fiber. x86-64 only.
//
// This core is built without sanitizers. What touches a kernel's memory is inlined from device.h, and so instrumented
// with the kernel. ThreadSanitizer is told of fibers, and of barriers and launches as what orders them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulate {

enum class Order : int { random, greedy, fair };  // which fiber runs next: any; the last that became ready; the first

struct Config {
    int grid = 1, threads = 32;
    size_t shared = 0;  // bytes of dynamic shared memory that the launch asks for
    int resident = 4;   // blocks at a time
    uint64_t seed = 1;
    Order order = Order::random;
    bool late = true;  // asynchronous copies arrive as late as they may; false: at once
};

struct Stats {
    int64_t mma, ldmatrix, conflicts, shuffles, barriers, copied;
};
extern Stats stats;

// Runs the kernel in every thread of every block. What is wrong with the kernel is said on stderr, and ends the process
// with status 3.
void launch(const Config& config, void (*kernel)(const void*), const void* argument);

// What device.h is made of. A line and a column tell barriers apart.
enum class Kind : int { none, shuffle, mma_half, mma_bfloat, ldmatrix, ldmatrix_trans };
int thread();
int block();
char* shared();
void used(size_t bytes);
void sync_block(unsigned line, unsigned column);
void collective(Kind kind, const char* name, const uint32_t* in, int n_in, uint32_t* out, int n_out);
void yield();
[[noreturn]] void fail(const char* what, const char* at = nullptr);

struct Copy {
    void* to;
    const void* from;
    bool valid;
};
bool late();
void copied(int bytes);
void copy_begin(const Copy& copy);
void copy_commit();
bool copy_due(int groups, Copy* copy);  // one of this thread's oldest, while more than ``groups`` are under way

// A warp's instruction, from what its lanes gave to what they get: warp.cpp.
using Lanes = uint32_t[32][10];
void execute(Kind kind, const Lanes& in, uint32_t (&out)[32][4]);

float half_to_float(uint16_t);
float bfloat_to_float(uint16_t);
uint16_t float_to_half(float);
uint16_t float_to_bfloat(float);

}  // namespace emulate

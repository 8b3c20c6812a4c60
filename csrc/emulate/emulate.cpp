// Fibers, their order, barriers and launches. See emulate.h.
#include "emulate.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" {
// The sanitizers' own functions, null where the program has none.
#define WEAK __attribute__((weak))
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned);
WEAK void __tsan_switch_to_fiber(void*, unsigned);
WEAK void __tsan_acquire(void*);
WEAK void __tsan_release(void*);
WEAK void __sanitizer_start_switch_fiber(void**, const void*, size_t);
WEAK void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
void prefix_attn_switch(void** from, void* to);
}

asm(R"(
.globl prefix_attn_switch
.hidden prefix_attn_switch
prefix_attn_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");

namespace emulate {

Stats stats;

namespace {

constexpr size_t STACK = 128 << 10, GUARD = 4096, SLACK = 8 << 10;
constexpr int COPIES = 64;  // of a thread that are under way
constexpr unsigned NO_SYNC = 1;

struct Block;

// Two edges for each barrier, in turn: with one, a thread that leaves late would be ordered after those that have
// arrived at the next, and a race between them would not be seen.
struct Edges {
    char at[2];
    unsigned phase = 0;
    char* now() { return &at[phase % 2]; }
};

struct Warp {
    int arrived = 0, waiting[32], n_waiting = 0;
    Kind kind = Kind::none;
    Lanes in;
    uint32_t out[32][4];
};

struct Fiber {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    int thread = 0;
    Block* block = nullptr;
    bool done = false;
    void *tsan = nullptr, *fake_stack = nullptr;
    const char* waits = nullptr;
    Copy copies[COPIES];
    int group_of[COPIES], first_copy = 0, n_copies = 0, group = 0;
};

struct Block {
    int index, live, arrived = 0;
    unsigned line = 0, column = 0;
    char* shared;
    std::vector<Warp> warps;
    std::vector<Fiber*> fibers, waiting;
    Edges edges;
};

Config config;
void (*kernel)(const void*);
const void* argument;
std::vector<Fiber*> ready;
size_t first_ready;  // in order fair
Fiber home, *self;
std::vector<Block*> ended;
// Kept for later blocks: a sanitizer's fiber costs milliseconds to make.
std::vector<char*> stacks;
std::vector<void*> tsan_fibers;
uint64_t state;
char start_edge, end_edge;
const void* home_bottom;
size_t home_size;

uint64_t random_number() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

Fiber* pick() {
    const size_t n = ready.size() - first_ready;
    if (!n) return nullptr;
    if (config.order == Order::fair) {
        Fiber* f = ready[first_ready++];
        if (first_ready > 4096) {  // close the gap at the start
            ready.erase(ready.begin(), ready.begin() + first_ready);
            first_ready = 0;
        }
        return f;
    }
    const size_t i = config.order == Order::random ? random_number() % n : n - 1;
    Fiber* f = ready[i];
    ready[i] = ready.back();
    ready.pop_back();
    return f;
}

void make_ready(Fiber* f) {
    f->waits = nullptr;
    ready.push_back(f);
}

void go(Fiber* to) {
    Fiber* from = self;
    if (to == from) return;
    self = to;
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to->tsan, NO_SYNC);
    if (__sanitizer_start_switch_fiber)
        __sanitizer_start_switch_fiber(from->done ? nullptr : &from->fake_stack,
                                       to == &home ? home_bottom : to->stack, to == &home ? home_size : STACK);
    prefix_attn_switch(&from->stack_pointer, to->stack_pointer);
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
}

void next() {
    Fiber* f = pick();
    go(f ? f : &home);
}

void acquire(char* edge) {
    if (__tsan_acquire) __tsan_acquire(edge);
}
void release(char* edge) {
    if (__tsan_release) __tsan_release(edge);
}

// A fiber's life.
void run() {
    if (__sanitizer_finish_switch_fiber) {
        const void* bottom;
        size_t size;
        __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
        if (!home_bottom) home_bottom = bottom, home_size = size;
    }
    acquire(&start_edge);
    kernel(argument);
    release(&end_edge);
    if (self->n_copies) fail("a thread ended with copies under way");
    self->done = true;
    Block* b = self->block;
    b->live--;
    if (b->arrived && b->arrived >= b->live) fail("a barrier that ended threads never reach");
    go(&home);
    abort();
}

char* new_stack() {
    if (stacks.empty()) {
        void* p = mmap(nullptr, STACK + GUARD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) fail("no memory for a stack");
        mprotect(p, GUARD, PROT_NONE);
        stacks.push_back(static_cast<char*>(p) + GUARD);
    }
    char* stack = stacks.back();
    stacks.pop_back();
    return stack;
}

void* new_tsan_fiber() {
    if (!__tsan_create_fiber) return nullptr;
    if (tsan_fibers.empty()) tsan_fibers.push_back(__tsan_create_fiber(0));
    void* fiber = tsan_fibers.back();
    tsan_fibers.pop_back();
    return fiber;
}

Fiber* new_fiber(Block* block, int thread) {
    Fiber* f = new Fiber{};
    f->stack = new_stack();
    f->thread = thread;
    f->block = block;
    f->tsan = new_tsan_fiber();
    void** at = reinterpret_cast<void**>(f->stack + STACK);
    *--at = nullptr;  // so that the stack is aligned as after a call
    *--at = reinterpret_cast<void*>(&run);
    for (int i = 0; i < 6; i++)
        *--at = nullptr;
    f->stack_pointer = at;
    return f;
}

Block* begin(int index) {
    Block* b = new Block{};
    b->index = index;
    b->live = config.threads;
    const size_t bytes = (config.shared + SLACK + 1023) / 1024 * 1024;
    b->shared = static_cast<char*>(aligned_alloc(1024, bytes));
    for (size_t i = 0; i < bytes / 8; i++)
        reinterpret_cast<volatile uint64_t*>(b->shared)[i] = ~0ull;  // NaN
    b->waiting.reserve(config.threads);
    b->warps.resize((config.threads + 31) / 32);
    for (int t = 0; t < config.threads; t++) {
        b->fibers.push_back(new_fiber(b, t));
        make_ready(b->fibers.back());
    }
    release(&start_edge);
    return b;
}

// What a block had is kept until the launch is over: to free it now would order later blocks after this one, and no
// race between the two would be seen.
void end(Block* b) {
    for (Fiber* f : b->fibers) {
        if (f->tsan) tsan_fibers.push_back(f->tsan);
        stacks.push_back(f->stack);
    }
    ended.push_back(b);
}

void clean() {
    acquire(&end_edge);
    for (Block* b : ended) {
        for (Fiber* f : b->fibers)
            delete f;
        free(b->shared);
        delete b;
    }
    ended.clear();
}

[[noreturn]] void deadlock(const std::vector<Block*>& resident) {
    for (Block* b : resident)
        for (Fiber* f : b->fibers)
            if (!f->done)
                fprintf(stderr, "  block %d thread %d waits at %s\n", b->index, f->thread, f->waits ? f->waits : "?");
    fail("deadlock");
}

}  // namespace

void launch(const Config& given, void (*run_kernel)(const void*), const void* with) {
    config = given;
    kernel = run_kernel;
    argument = with;
    state = given.seed * 0x9e3779b97f4a7c15ull + 1;
    first_ready = 0;
    ready.clear();
    ready.reserve(size_t(given.resident) * given.threads * 4 + 8192);
    self = &home;
    if (__tsan_get_current_fiber) home.tsan = __tsan_get_current_fiber();
    release(&start_edge);
    std::vector<Block*> resident;
    int started = 0;
    while (started < given.grid || !resident.empty()) {
        while (started < given.grid && int(resident.size()) < given.resident)
            resident.push_back(begin(started++));
        Fiber* f = pick();
        if (!f) deadlock(resident);
        go(f);
        for (size_t i = 0; i < resident.size();) {
            if (resident[i]->live) {
                i++;
                continue;
            }
            end(resident[i]);
            resident[i] = resident.back();
            resident.pop_back();
        }
    }
    clean();
}

int thread() {
    return self->thread;
}
int block() {
    return self->block->index;
}
char* shared() {
    return self->block->shared;
}
void used(size_t bytes) {
    if (bytes > config.shared) fail("more shared memory is used than the launch asks for");
}

void yield() {
    make_ready(self);
    next();
}

void sync_block(unsigned line, unsigned column) {
    Block* b = self->block;
    char* edge = b->edges.now();
    release(edge);
    if (!b->arrived) {
        b->line = line;
        b->column = column;
        stats.barriers++;
    } else if (b->line != line || b->column != column) {
        fprintf(stderr, "  line %u column %u, and line %u column %u\n", b->line, b->column, line, column);
        fail("threads of a block wait at different barriers");
    }
    if (++b->arrived == config.threads) {
        b->arrived = 0;
        b->edges.phase++;
        for (Fiber* f : b->waiting)
            make_ready(f);
        b->waiting.clear();
        if (config.order != Order::greedy) yield();
    } else {
        if (b->arrived >= b->live) fail("a barrier that ended threads never reach");
        self->waits = "a barrier";
        b->waiting.push_back(self);
        next();
    }
    acquire(edge);
}

void collective(Kind kind, const char* name, const uint32_t* in, int n_in, uint32_t* out, int n_out) {
    Warp& w = self->block->warps[self->thread / 32];
    const int lane = self->thread % 32;
    if (w.arrived && w.kind != kind) fail("lanes of a warp are at different instructions", name);
    w.kind = kind;
    for (int i = 0; i < n_in; i++)
        w.in[lane][i] = in[i];
    if (++w.arrived == 32) {
        execute(kind, w.in, w.out);
        w.arrived = 0;
        for (int i = 0; i < w.n_waiting; i++)
            make_ready(self->block->fibers[w.waiting[i]]);
        w.n_waiting = 0;
    } else {
        self->waits = name;
        w.waiting[w.n_waiting++] = self->thread;
        next();
    }
    for (int i = 0; i < n_out; i++)
        out[i] = w.out[lane][i];
}

bool late() {
    return config.late;
}
void copied(int bytes) {
    stats.copied += bytes;
}
void copy_begin(const Copy& copy) {
    if (self->n_copies == COPIES) fail("too many copies are under way");
    const int i = (self->first_copy + self->n_copies++) % COPIES;
    self->copies[i] = copy;
    self->group_of[i] = self->group;
}
void copy_commit() {
    self->group++;
}
bool copy_due(int groups, Copy* copy) {
    const int i = self->first_copy;
    if (!self->n_copies || self->group_of[i] + groups >= self->group) return false;
    *copy = self->copies[i];
    self->first_copy = (i + 1) % COPIES;
    self->n_copies--;
    return true;
}

void fail(const char* what, const char* at) {
    fprintf(stderr, "EMULATE: %s%s%s (block %d, thread %d)\n", what, at ? ", at " : "", at ? at : "",
            self && self->block ? self->block->index : -1, self ? self->thread : -1);
    _Exit(3);
}

}  // namespace emulate

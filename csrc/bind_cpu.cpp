// The CPU kernels as torch ops, through the stable ABI: one binary for torch 2.10 and newer. They check what they are
// given, fill in the structs of args.h and hand units to torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "args.h"
#include "cpu/bank.h"

using prefix_attn::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t SMALL = 1 << 17;  // multiplications that are done before a second thread is awake

template <typename T>
T* data(const Maybe& t) {
    return t ? (T*)t->const_data_ptr() : nullptr;
}

// The length of the longest packed sequence; of an array that is not packed, all of it.
int64_t longest(const int64_t* cu, int64_t B, int64_t total) {
    if (!cu) return total;
    int64_t most = 0;
    for (int64_t b = 0; b < B; b++)
        most = std::max(most, std::min(cu[b + 1], total) - std::max<int64_t>(cu[b], 0));
    return most;
}

bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
    const auto sizes = t.sizes();
    return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

bool in_a_row(const Tensor& t) {  // the last dimension
    const int64_t last = t.dim() - 1;
    return last >= 0 && (t.stride(last) == 1 || t.size(last) < 2);
}

// Takes the arguments of an op off its stack, in the order of the schema. It keeps what the structs of args.h point
// into: the tensors, and copies of those that the kernels cannot read as they are. What is wrong with them is said when
// all are taken: a tensor that is left on the stack leaks.
struct Reader {
    StableIValue* next;
    std::vector<Tensor> kept;
    std::vector<std::unique_ptr<char[]>> copies;
    const char* problem = nullptr;

    explicit Reader(StableIValue* stack) : next(stack) {
        kept.reserve(24);  // more than either op takes
    }

    template <typename T>
    T take() {
        return torch::stable::detail::to<T>(*next++);
    }

    Tensor tensor() {
        kept.push_back(take<Tensor>());
        need(kept.back().is_cpu(), "the kernels take tensors on the CPU");
        return kept.back();
    }

    Maybe maybe() {
        Maybe t = take<Maybe>();
        if (t) kept.push_back(*t);
        if (t) need(t->is_cpu(), "the kernels take tensors on the CPU");
        return t;
    }

    void need(bool holds, const char* sentence) {
        if (!holds && !problem) problem = sentence;
    }

    // A bank's strides; those of one prefix, of three dimensions, where it may be one.
    prefix_attn::Array array(const Maybe& t, bool prefix = false) {
        prefix_attn::Array x;
        if (!t) return x;
        const ScalarType type = t->scalar_type();
        const bool half = type == ScalarType::Half || type == ScalarType::BFloat16;
        const int64_t row = t->dim() - 2;
        need(half || type == ScalarType::Float, "the kernels take float32, bfloat16 and float16");
        need(row == 2 || (prefix && row == 1), "the kernels take tensors of four dimensions, or a prefix of three");
        need(in_a_row(*t), "the last dimension must be contiguous");
        if (problem) return x;
        x.data = t->const_data_ptr();
        x.batch = row == 2 ? t->stride(0) : 0;
        x.head = t->stride(row - 1);
        x.row = t->stride(row);
        x.type = !half                          ? prefix_attn::Type::f32
                 : type == ScalarType::BFloat16 ? prefix_attn::Type::bf16
                                                : prefix_attn::Type::f16;
        return x;
    }

    template <typename T>
    T* room(int64_t n) {
        copies.emplace_back(new char[n * sizeof(T)]);
        return (T*)copies.back().get();
    }

    // ``n`` integers. Where ``strict`` they must lie between ``low`` and ``high``.
    const int64_t* integers(const Maybe& t, int64_t n, bool strict = false, int64_t low = 0, int64_t high = 0) {
        if (!t) return nullptr;
        const ScalarType type = t->scalar_type();
        need(type == ScalarType::Long || type == ScalarType::Int, "ids, lengths and starts are int32 or int64");
        need(has_shape(*t, {n}), "ids, lengths or starts are too many or too few");
        if (problem) return nullptr;
        const void* from = t->const_data_ptr();
        const int64_t* x = (const int64_t*)from;
        if (type == ScalarType::Int || !in_a_row(*t)) {
            int64_t* to = room<int64_t>(n);
            for (int64_t i = 0, at = 0; i < n; i++, at += t->stride(0))
                to[i] = type == ScalarType::Int ? ((const int32_t*)from)[at] : ((const int64_t*)from)[at];
            x = to;
        }
        const auto fits = [&](int64_t one) { return low <= one && one <= high; };
        need(!strict || std::all_of(x, x + n, fits), "ids or lengths are out of range");
        return x;
    }

    const float* floats(const Maybe& t, int64_t n) {
        if (!t) return nullptr;
        const ScalarType type = t->scalar_type();
        need(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, "sinks are floats");
        need(has_shape(*t, {n}), "sinks must be (HQ)");
        if (problem) return nullptr;
        const void* from = t->const_data_ptr();
        if (type == ScalarType::Float && in_a_row(*t)) return (const float*)from;
        float* to = room<float>(n);
        for (int64_t i = 0, at = 0; i < n; i++, at += t->stride(0))
            to[i] = type == ScalarType::Float      ? ((const float*)from)[at]
                    : type == ScalarType::BFloat16 ? (float)((const torch::headeronly::BFloat16*)from)[at]
                                                   : (float)((const torch::headeronly::Half*)from)[at];
        return to;
    }

    const uint8_t* mask(const Maybe& t, int64_t B, int64_t T) {
        if (!t) return nullptr;
        need(t->scalar_type() == ScalarType::Bool && has_shape(*t, {B, T}), "key_mask must be (B, T) bool");
        if (problem) return nullptr;
        const uint8_t* from = (const uint8_t*)t->const_data_ptr();
        if (t->is_contiguous()) return from;
        uint8_t* to = room<uint8_t>(B * T);
        for (int64_t b = 0; b < B; b++)
            for (int64_t j = 0; j < T; j++)
                to[b * T + j] = from[b * t->stride(0) + j * t->stride(1)];
        return to;
    }
};

// The rules of prefix_attn/call.py on types and shapes, which then says in words what was wrong.
void check(Reader& r, const prefix_attn::Arguments& x, const Tensor& query, const Tensor& key, const Tensor& value,
           const Maybe& prefix_key, const Maybe& prefix_value, bool ids) {
    const auto like_query = [&](const prefix_attn::Array& a) { return a.type == x.query.type; };
    const auto like_either = [&](const prefix_attn::Array& a) { return like_query(a) || a.type == Type::f32; };
    const int64_t rows = query.size(0);
    r.need(like_query(x.key) && like_query(x.value), "key and value are in query's dtype");
    r.need(has_shape(key, {rows, x.HKV, x.NK, x.D}), "key must be (B, HKV, T, D)");
    r.need(has_shape(value, {rows, x.HKV, x.NK, x.DV}), "value must be (B, HKV, T, DV)");
    r.need(1 <= x.D && x.D <= 256 && 1 <= x.DV && x.DV <= 256, "the kernels take heads of up to 256");
    r.need(x.HKV > 0 && x.HQ % x.HKV == 0, "query heads must be a multiple of key heads");
    r.need(prefix_key.has_value() == prefix_value.has_value(), "a prefix has keys and values");
    if (r.problem || !prefix_key) return;
    r.need(like_either(x.prefix_key) && like_either(x.prefix_value), "a prefix is in query's dtype or float32");
    if (prefix_key->dim() == 3)
        r.need(has_shape(*prefix_key, {x.HKV, x.P, x.D}) && has_shape(*prefix_value, {x.HKV, x.P, x.DV}),
               "a prefix must be (HKV, P, D) and (HKV, P, DV)");
    else
        r.need(has_shape(*prefix_key, {x.N, x.HKV, x.P, x.D}) && has_shape(*prefix_value, {x.N, x.HKV, x.P, x.DV}) &&
                   (ids || x.N == 1 || x.N == x.B),
               "a bank must be (N, HKV, P, D) and (N, HKV, P, DV), with an entry for each row");
}

// What both ops take first: ARGUMENTS of the schemas below.
prefix_attn::Arguments arguments(Reader& r) {
    const Tensor query = r.tensor(), key = r.tensor(), value = r.tensor();
    const Maybe prefix_key = r.maybe(), prefix_value = r.maybe(), sinks = r.maybe(), ids = r.maybe(),
                prefix_lengths = r.maybe(), prefix_start = r.maybe(), key_lengths = r.maybe(), key_mask = r.maybe(),
                cu_q = r.maybe(), cu_k = r.maybe();
    prefix_attn::Arguments x;
    x.causal = r.take<bool>();
    const auto window = r.take<std::optional<int64_t>>();
    const auto scale = r.take<std::optional<double>>(), softcap = r.take<std::optional<double>>();
    const bool strict = r.take<bool>();
    x.query = r.array(query);
    x.key = r.array(key);
    x.value = r.array(value);
    x.prefix_key = r.array(prefix_key, true);
    x.prefix_value = r.array(prefix_value, true);
    if (r.problem) return x;
    const bool bank = prefix_key && prefix_key->dim() == 4;
    x.B = cu_q ? cu_q->numel() - 1 : query.size(0);
    x.HQ = query.size(1);
    x.NQ = query.size(2);
    x.D = query.size(3);
    x.HKV = key.size(1);
    x.NK = key.size(2);
    x.DV = value.size(3);
    x.N = bank ? prefix_key->size(0) : 1;
    x.P = prefix_key ? prefix_key->size(bank ? 2 : 1) : 0;
    x.window = window.value_or(0);
    x.scale = (float)scale.value_or(std::pow((double)x.D, -0.5));
    x.softcap = (float)softcap.value_or(0);
    check(r, x, query, key, value, prefix_key, prefix_value, ids.has_value());
    r.need(!window || *window > 0, "a window holds at least one key");
    r.need(!scale || std::isfinite(*scale), "scale must be finite");
    r.need(!softcap || (*softcap > 0 && std::isfinite(*softcap)), "softcap must be positive and finite");
    r.need(cu_q.has_value() == cu_k.has_value() && x.B >= 0, "packed sequences have bounds of queries and of keys");
    r.need(bank || !(ids || prefix_lengths), "prefix_ids and prefix_lengths need a bank");
    x.sinks = r.floats(sinks, x.HQ);
    x.ids = r.integers(ids, x.B, strict, -1, x.N - 1);
    x.prefix_lengths = r.integers(prefix_lengths, x.N, strict, 0, x.P);
    x.prefix_start = r.integers(prefix_start, x.B);
    x.key_lengths = r.integers(key_lengths, x.B, strict, 0, x.NK);
    x.key_mask = r.mask(key_mask, x.B, x.NK);
    x.cu_q = r.integers(cu_q, x.B + 1);
    x.cu_k = r.integers(cu_k, x.B + 1);
    if (r.problem) return x;
    x.S = longest(x.cu_q, x.B, x.NQ);
    x.T = longest(x.cu_k, x.B, x.NK);
    return x;
}

const prefix_attn::Kernels& kernels() {
    const char* reason = "";
    const prefix_attn::Kernels* found = prefix_attn::pick(&reason);
    STD_TORCH_CHECK(found, reason);
    return *found;
}

// The packed prefix. The buffer is the calling thread's and only grows: fresh memory costs more than filling it. Where
// no row reads an entry it is not touched.
const float* packed(const prefix_attn::Kernels& k, const prefix_attn::Arguments& c, bool backward) {
    thread_local std::unique_ptr<float[]> memory;
    thread_local int64_t size = 0;
    const int64_t floats = k.packed_floats(c, backward);
    if (!floats) return nullptr;
    if (size < floats) {
        size = 0;
        memory.reset();
        memory.reset(new float[floats]);
        size = floats;
    }
    float* to = memory.get();
    torch::stable::parallel_for(0, c.N * c.HKV, 1, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; unit++)
            k.pack(c, backward, to, unit);
    });
    return to;
}

// A new tensor of the query's dtype or float32.
Tensor empty(const std::array<int64_t, 4>& size, const std::array<int64_t, 4>& stride, int64_t dims, int32_t dtype) {
    AtenTensorHandle made;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, size.data(), stride.data(), dtype,
                                                    aoti_torch_device_type_cpu(), 0, &made));
    return Tensor(made);
}

// Runs the units of ``f`` on torch's threads.
void run(const prefix_attn::Forward& f) {
    const prefix_attn::Arguments& c = f.args;
    const prefix_attn::Kernels& k = kernels();
    const float* prefix = packed(k, c, false);
    const int64_t units = k.forward_units(c), work = c.B * c.HQ * c.S * (c.P + c.T) * (c.D + c.DV);
    torch::stable::parallel_for(0, units, work < SMALL ? units : 1, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; unit++)
            k.forward(f, prefix, unit);
    });
}

// Boxed kernels, in the calling convention of the stable ABI: arguments come on a stack, and results go there.
void forward(StableIValue* stack, uint64_t, uint64_t) {
    Reader r(stack);
    prefix_attn::Forward f;
    f.args = arguments(r);
    STD_TORCH_CHECK(!r.problem, r.problem);
    const prefix_attn::Arguments& c = f.args;
    const int64_t rows = r.kept[0].size(0), heads = std::max<int64_t>(c.HQ, 1), queries = std::max<int64_t>(c.NQ, 1);
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(r.kept[0].get(), &dtype));
    // In the memory order (B, S, HQ, DV), which models reshape for free.
    f.out = {nullptr, queries * heads * c.DV, c.DV, heads * c.DV, c.query.type};
    const Tensor out = empty({rows, c.HQ, c.NQ, c.DV}, {f.out.batch, f.out.head, f.out.row, 1}, 4, dtype);
    const Tensor lse = empty({rows, c.HQ, c.NQ}, {heads * queries, queries, 1}, 3, aoti_torch_dtype_float32());
    f.out.data = out.mutable_data_ptr();
    f.lse = (float*)lse.mutable_data_ptr();
    if (c.cu_q) {  // nobody writes the tokens behind bounds that end too early
        std::memset(out.mutable_data_ptr(), 0, out.numel() * (c.query.type == Type::f32 ? 4 : 2));
        std::fill(f.lse, f.lse + lse.numel(), -INF);
    }
    const prefix_attn::Bank bank = prefix_attn::group_rows(f.args);
    if (lse.numel()) run(f);
    stack[0] = torch::stable::detail::from(out);
    stack[1] = torch::stable::detail::from(lse);
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
    Reader r(stack);
    prefix_attn::Backward f;
    f.args = arguments(r);
    f.out = r.array(r.tensor());
    f.lse = (const float*)r.tensor().const_data_ptr();
    f.grad_out = r.array(r.tensor());
    f.grad_lse = data<float>(r.maybe());
    f.grad_query = r.array(r.maybe());
    f.grad_key = r.array(r.maybe());
    f.grad_value = r.array(r.maybe());
    f.grad_prefix_key = data<float>(r.maybe());
    f.grad_prefix_value = data<float>(r.maybe());
    f.slots = r.take<int64_t>();
    f.share = data<float>(r.maybe());
    STD_TORCH_CHECK(!r.problem, r.problem);
    const prefix_attn::Kernels& k = kernels();
    const prefix_attn::Bank bank = prefix_attn::group_rows(f.args);
    const float* prefix = packed(k, f.args, true);
    torch::stable::parallel_for(0, k.backward_units(f), 1, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; unit++)
            k.backward(f, prefix, unit);
    });
}

// The name of the instruction set that runs.
std::string isa() {
    return kernels().name;
}

// Counts the changes of the schemas below, so that a library of other sources is not called. _native.py has it too.
int64_t interface() {
    return 2;
}

}  // namespace

// ``strict``: ids and lengths that are out of range are refused. Without it, no row reads them.
#define ARGUMENTS                                                                                                      \
    "Tensor query, Tensor key, Tensor value, Tensor? prefix_key, Tensor? prefix_value, Tensor? sinks, "                \
    "Tensor? prefix_ids, Tensor? prefix_lengths, Tensor? prefix_start, Tensor? key_lengths, Tensor? key_mask, "        \
    "Tensor? cu_q, Tensor? cu_k, bool causal, int? window, float? scale, float? softcap, bool strict"

STABLE_TORCH_LIBRARY(prefix_attn_cpu, m) {
    m.def("forward(" ARGUMENTS ") -> (Tensor out, Tensor lse)");
    m.def("backward(" ARGUMENTS
          ", Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, Tensor(a!)? grad_query, Tensor(b!)? grad_key, "
          "Tensor(c!)? grad_value, Tensor(d!)? grad_prefix_key, Tensor(e!)? grad_prefix_value, int slots, "
          "Tensor(f!)? share) -> ()");
    m.def("isa() -> str");
    m.def("interface() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(prefix_attn_cpu, CPU, m) {
    m.impl("forward", &forward);
    m.impl("backward", &backward);
}

STABLE_TORCH_LIBRARY_IMPL(prefix_attn_cpu, CompositeExplicitAutograd, m) {
    m.impl("isa", TORCH_BOX(&isa));
    m.impl("interface", TORCH_BOX(&interface));
}

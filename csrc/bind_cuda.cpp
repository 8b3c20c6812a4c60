// The decode kernel as a torch op, through the stable ABI: one binary for torch 2.10 and newer. It checks what it is
// given, makes the results and the slots, and launches on the current stream. With PREFIX_ATTN_EMULATE the same op
// takes tensors on the CPU, and runs on the emulated GPU.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "cuda/decode.h"

#if defined(PREFIX_ATTN_EMULATE)
#include "emulate/launch.h"
#define NAME prefix_attn_emulated
#define KEY CPU
#else
#include <torch/csrc/stable/accelerator.h>
#define NAME prefix_attn_cuda
#define KEY CUDA
#endif

using prefix_attn::Decode;
using prefix_attn::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

namespace {

bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
    const auto sizes = t.sizes();
    return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

bool on_device(const Tensor& t) {
#if defined(PREFIX_ATTN_EMULATE)
    return t.is_cpu();
#else
    return t.is_cuda();
#endif
}

// Takes the arguments off the op's stack, in the order of the schema, and keeps the first thing that is wrong with
// them: it is said when all are taken, since a tensor that is left on the stack leaks.
struct Reader {
    StableIValue* next;
    std::vector<Tensor> kept;
    const char* problem = nullptr;

    explicit Reader(StableIValue* stack) : next(stack) { kept.reserve(10); }

    template <typename T>
    T take() {
        return torch::stable::detail::to<T>(*next++);
    }

    void need(bool holds, const char* sentence) {
        if (!holds && !problem) problem = sentence;
    }

    Maybe maybe() {
        Maybe t = take<Maybe>();
        if (t) keep(*t);
        return t;
    }

    Tensor tensor() {
        keep(take<Tensor>());
        return kept.back();
    }

    void keep(const Tensor& t) {
        kept.push_back(t);
        need(on_device(t) && t.get_device_index() == kept[0].get_device_index(), "all tensors are on query's device");
    }

    // Copies move 16 bytes at a time. A prefix of three dimensions has one entry.
    prefix_attn::Array array(const Maybe& t) {
        prefix_attn::Array x;
        if (!t) return x;
        const ScalarType type = t->scalar_type();
        const int64_t row = t->dim() - 2;
        need(type == ScalarType::Half || type == ScalarType::BFloat16, "the kernel takes float16 and bfloat16");
        need(row == 1 || row == 2, "the kernel takes tensors of four dimensions, or a prefix of three");
        if (problem) return x;
        need(t->stride(row + 1) == 1, "the last dimension must be contiguous");
        x.data = t->const_data_ptr();
        x.batch = row == 2 ? t->stride(0) : 0;
        x.head = t->stride(row - 1);
        x.row = t->stride(row);
        x.type = type == ScalarType::BFloat16 ? Type::bf16 : Type::f16;
        const bool whole = (x.batch | x.head | x.row) % 8 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
        need(whole || !t->numel(), "rows must begin at multiples of 16 bytes");
        return x;
    }

    prefix_attn::Integers integers(const Maybe& t, int64_t n) {
        if (!t) return {};
        const ScalarType type = t->scalar_type();
        need(type == ScalarType::Long || type == ScalarType::Int, "ids and lengths are int32 or int64");
        need(has_shape(*t, {n}) && t->is_contiguous(), "ids or lengths are too many, too few or not contiguous");
        return {t->const_data_ptr(), type == ScalarType::Long};
    }
};

// The rules of prefix_attn/call.py on shapes, which says in words what was wrong, and those of backends/cuda.py.
void check(Reader& r, const Decode& x, const Tensor& key, const Tensor& value, const Maybe& prefix_key,
           const Maybe& prefix_value, bool ids) {
    const auto like_query = [&](const prefix_attn::Array& a) { return a.type == x.query.type; };
    r.need(like_query(x.key) && like_query(x.value), "key and value are in query's dtype");
    r.need(has_shape(key, {x.B, x.HKV, x.T, x.D}) && has_shape(value, {x.B, x.HKV, x.T, x.D}),
           "key and value must be (B, HKV, T, D)");
    r.need(x.D == 64 || x.D == 80 || x.D == 96 || x.D == 128, "the kernel takes heads of 64, 80, 96 and 128");
    r.need(prefix_key.has_value() == prefix_value.has_value(), "a prefix has keys and values");
    if (r.problem || !prefix_key) return;
    r.need(like_query(x.prefix_key) && like_query(x.prefix_value), "a prefix is in query's dtype");
    if (prefix_key->dim() == 3)
        r.need(has_shape(*prefix_key, {x.HKV, x.P, x.D}) && has_shape(*prefix_value, {x.HKV, x.P, x.D}),
               "a prefix must be (HKV, P, D)");
    else
        r.need(has_shape(*prefix_key, {x.N, x.HKV, x.P, x.D}) && has_shape(*prefix_value, {x.N, x.HKV, x.P, x.D}) &&
                   (ids || x.N == 1 || x.N == x.B),
               "a bank must be (N, HKV, P, D), with an entry for each row");
}

// Sizes in 32 bits; offsets are made of strides, in 64.
void set_sizes(Reader& r, Decode& x, const Tensor& query, const Tensor& key, const Maybe& prefix_key) {
    const bool bank = prefix_key && prefix_key->dim() == 4;
    const int64_t HQ = query.size(1), HKV = key.size(1), P = prefix_key ? prefix_key->size(bank ? 2 : 1) : 0;
    const int64_t N = bank ? prefix_key->size(0) : 1, MOST = std::numeric_limits<int32_t>::max() / 2;
    for (int64_t n : {query.size(0), HQ, query.size(2), key.size(2), P, N})
        r.need(n <= MOST, "a dimension is too large");
    // No overflow here: the tensor has more elements.
    r.need(query.size(0) * HQ * query.size(2) <= MOST, "there are too many queries");
    r.need(HKV > 0 && HQ % std::max<int64_t>(HKV, 1) == 0, "query heads must be a multiple of key heads");
    if (r.problem) return;
    x.B = (int)query.size(0), x.HKV = (int)HKV, x.G = (int)(HQ / HKV), x.S = (int)query.size(2);
    x.T = (int)key.size(2), x.P = (int)P, x.N = (int)N, x.D = (int)query.size(3);
}

void set_options(Reader& r, Decode& x, int64_t size) {
    x.causal = r.take<bool>();
    const auto window = r.take<std::optional<int64_t>>();
    const auto given = r.take<std::optional<double>>(), softcap = r.take<std::optional<double>>();
    const double scale = given.value_or(std::pow((double)size, -0.5)), log2e = 1.4426950408889634;
    r.need(!window || *window > 0, "a window holds at least one key");
    r.need(std::isfinite(scale), "scale must be finite");
    r.need(!softcap || (*softcap > 0 && std::isfinite(*softcap)), "softcap must be positive and finite");
    x.window = (int)std::min<int64_t>(window.value_or(0), 1 << 30);  // a position minus it stays in 32 bits
    x.scale = (float)(softcap ? 2 * log2e * scale / *softcap : log2e * scale);
    x.softcap = (float)(softcap.value_or(0) * log2e);
}

// The call, all but what is made for it.
Decode arguments(Reader& r) {
    Decode x;
    const Tensor query = r.tensor(), key = r.tensor(), value = r.tensor();
    const Maybe prefix_key = r.maybe(), prefix_value = r.maybe(), sinks = r.maybe(), ids = r.maybe(),
                prefix_lengths = r.maybe(), key_lengths = r.maybe(), mask = r.maybe();
    set_options(r, x, query.dim() ? std::max<int64_t>(query.size(query.dim() - 1), 1) : 1);
    r.need(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "query, key and value have four dimensions");
    x.query = r.array(query), x.key = r.array(key), x.value = r.array(value);
    x.prefix_key = r.array(prefix_key), x.prefix_value = r.array(prefix_value);
    if (!r.problem) set_sizes(r, x, query, key, prefix_key);
    if (r.problem) return x;
    check(r, x, key, value, prefix_key, prefix_value, ids.has_value());
    r.need((prefix_key && prefix_key->dim() == 4) || !(ids || prefix_lengths), "ids and lengths need a bank");
    x.ids = r.integers(ids, x.B);
    x.prefix_lengths = r.integers(prefix_lengths, x.N);
    x.key_lengths = r.integers(key_lengths, x.B);
    if (mask) {
        r.need(mask->scalar_type() == ScalarType::Bool && has_shape(*mask, {x.B, x.T}) && mask->is_contiguous(),
               "key_mask must be (B, T) bool, contiguous");
        x.key_mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    }
    if (sinks) {
        x.sinks_float = sinks->scalar_type() == ScalarType::Float;
        r.need(x.sinks_float || sinks->scalar_type() == query.scalar_type(), "sinks are float32 or in query's dtype");
        r.need(has_shape(*sinks, {int64_t(x.HKV) * x.G}) && sinks->is_contiguous(), "sinks must be (HQ), contiguous");
        x.sinks = sinks->const_data_ptr();
    }
    return x;
}

Tensor empty(std::initializer_list<int64_t> size, std::initializer_list<int64_t> stride, int32_t dtype,
             const Tensor& like) {
    AtenTensorHandle made;
    int32_t type, index;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided((int64_t)size.size(), size.begin(), stride.begin(), dtype, type, index, &made));
    return Tensor(made);
}

// Slots and counters lie in one allocation: slots_out, slots_lse, arrived.
Tensor workspace(Decode& x, const Tensor& like) {
    const int64_t rows = x.plan.slot_rows(x.HKV) * x.plan.parts(), counters = int64_t(x.plan.units) * x.HKV;
    const Tensor made = empty({rows * (x.D + 1) + counters}, {1}, aoti_torch_dtype_float32(), like);
    x.slots_out = static_cast<float*>(made.mutable_data_ptr());
    x.slots_lse = x.slots_out + rows * x.D;
    x.arrived = reinterpret_cast<int*>(x.slots_lse + rows);
    return made;
}

void run(Decode& x, const Tensor& query) {
#if defined(PREFIX_ATTN_EMULATE)
    const int device = 0;
    void* stream = nullptr;
#else
    const int device = query.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
#endif
    x.plan = prefix_attn::make_plan(x, prefix_attn::machine(device));
    STD_TORCH_CHECK(x.plan.blocks(x.HKV) <= std::numeric_limits<int32_t>::max(), "the call needs too many blocks");
    const Tensor slots = workspace(x, query);
    const char* wrong = prefix_attn::launch_decode(x, stream);
    STD_TORCH_CHECK(!wrong, wrong);
}

// In the calling convention of the stable ABI: arguments come on a stack, and results go there.
void decode(StableIValue* stack, uint64_t, uint64_t) {
    Reader r(stack);
    Decode x = arguments(r);
    STD_TORCH_CHECK(!r.problem, r.problem);
    const Tensor& query = r.kept[0];
    const int64_t HQ = int64_t(x.HKV) * x.G, heads = std::max<int64_t>(HQ, 1), queries = std::max(x.S, 1);
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(query.get(), &dtype));
    // In the memory order (B, S, HQ, D), which models reshape for free.
    x.out = {nullptr, queries * heads * x.D, x.D, heads * x.D, x.query.type};
    const Tensor out = empty({x.B, HQ, x.S, x.D}, {x.out.batch, x.out.head, x.out.row, 1}, dtype, query);
    const Tensor lse =
        empty({x.B, HQ, x.S}, {heads * queries, queries, 1}, aoti_torch_dtype_float32(), query);
    x.out.data = out.mutable_data_ptr();
    x.lse = static_cast<float*>(lse.mutable_data_ptr());
    if (lse.numel()) run(x, query);
    stack[0] = torch::stable::detail::from(out);
    stack[1] = torch::stable::detail::from(lse);
}

// Counts the changes of the schema below, so that a library of other sources is not called. _native_cuda.py has it too.
int64_t interface() {
    return 1;
}

#if defined(PREFIX_ATTN_EMULATE)
// How the next launches run: see emulate::Config and prefix_attn::Machine.
void configure(int64_t order, int64_t seed, bool late, int64_t resident, int64_t processors, int64_t fold_bytes,
               int64_t split_keys, bool runs) {
    dev::settings = {1, 32, 0, (int)resident, (uint64_t)seed, (emulate::Order)order, late};
    dev::small = {(int)processors, fold_bytes, (int)split_keys};
    dev::runs = runs;
}

// What was counted since the last call, in the order of emulate::Stats.
std::string counted() {
    const emulate::Stats s = emulate::stats;
    emulate::stats = {};
    std::string text;
    for (int64_t n : {s.mma, s.ldmatrix, s.conflicts, s.shuffles, s.barriers, s.copied})
        text += std::to_string(n) + " ";
    return text;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY(NAME, m) {
    m.def(
        "decode(Tensor query, Tensor key, Tensor value, Tensor? prefix_key, Tensor? prefix_value, Tensor? sinks, "
        "Tensor? prefix_ids, Tensor? prefix_lengths, Tensor? key_lengths, Tensor? key_mask, bool causal, int? window, "
        "float? scale, float? softcap) -> (Tensor out, Tensor lse)");
    m.def("interface() -> int");
#if defined(PREFIX_ATTN_EMULATE)
    m.def(
        "configure(int order, int seed, bool late, int resident, int processors, int fold_bytes, int split_keys, "
        "bool runs) -> ()");
    m.def("counted() -> str");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(NAME, KEY, m) {
    m.impl("decode", &decode);
}

STABLE_TORCH_LIBRARY_IMPL(NAME, CompositeExplicitAutograd, m) {
    m.impl("interface", TORCH_BOX(&interface));
#if defined(PREFIX_ATTN_EMULATE)
    m.impl("configure", TORCH_BOX(&configure));
    m.impl("counted", TORCH_BOX(&counted));
#endif
}

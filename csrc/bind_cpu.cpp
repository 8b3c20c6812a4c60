// The CPU kernels as torch ops, through the stable ABI: one binary for torch 2.10 and newer. Only fills in the structs
// of args.h and hands units to torch's threads; shapes and dtypes were checked by prefix_attn/backends/cpu.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "args.h"
#include "cpu/bank.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

namespace {

template <typename T>
T* data(const Maybe& t) {
    return t ? (T*)t->const_data_ptr() : nullptr;
}

// The length of the longest packed sequence; of an array that is not packed, all of it.
int64_t longest(const Maybe& cu, int64_t total) {
    if (!cu) return total;
    const int64_t* x = (const int64_t*)cu->const_data_ptr();
    int64_t most = 0;
    for (int64_t i = 0; i + 1 < cu->size(0); i++)
        most = std::max(most, std::min(x[i + 1], total) - std::max<int64_t>(x[i], 0));
    return most;
}

// Takes the arguments of an op off its stack, in the order of the schema, and keeps the tensors alive that the structs of
// args.h point into. What is wrong with them is said when all are taken: a tensor that is left on the stack leaks.
struct Reader {
    StableIValue* next;
    std::vector<Tensor> kept;
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
        return kept.back();
    }

    Maybe maybe() {
        Maybe t = take<Maybe>();
        if (t) kept.push_back(*t);
        return t;
    }

    void need(bool holds, const char* sentence) {
        if (!holds && !problem) problem = sentence;
    }

    prefix_attn::Array array(const Maybe& t) {
        prefix_attn::Array x;
        if (!t) return x;
        const ScalarType type = t->scalar_type();
        const bool half = type == ScalarType::Half || type == ScalarType::BFloat16;
        need(half || type == ScalarType::Float, "the kernels take float32, bfloat16 and float16");
        need(t->dim() == 4, "the kernels take tensors of four dimensions");
        if (problem) return x;
        x.data = t->const_data_ptr();
        x.batch = t->stride(0);
        x.head = t->stride(1);
        x.row = t->stride(2);
        x.type = !half                          ? prefix_attn::Type::f32
                 : type == ScalarType::BFloat16 ? prefix_attn::Type::bf16
                                                : prefix_attn::Type::f16;
        return x;
    }
};

// What both ops take first: ARGUMENTS of the schemas below.
prefix_attn::Arguments arguments(Reader& r) {
    const Tensor query = r.tensor(), key = r.tensor(), value = r.tensor();
    const Maybe prefix_key = r.maybe(), prefix_value = r.maybe();
    prefix_attn::Arguments x;
    x.query = r.array(query);
    x.key = r.array(key);
    x.value = r.array(value);
    x.prefix_key = r.array(prefix_key);
    x.prefix_value = r.array(prefix_value);
    x.sinks = data<const float>(r.maybe());
    x.ids = data<const int64_t>(r.maybe());
    x.prefix_lengths = data<const int64_t>(r.maybe());
    x.prefix_start = data<const int64_t>(r.maybe());
    x.key_lengths = data<const int64_t>(r.maybe());
    const Maybe cu_q = r.maybe(), cu_k = r.maybe();
    x.cu_q = data<const int64_t>(cu_q);
    x.cu_k = data<const int64_t>(cu_k);
    x.key_mask = data<const uint8_t>(r.maybe());
    x.causal = r.take<bool>();
    x.window = r.take<int64_t>();
    x.scale = (float)r.take<double>();
    x.softcap = (float)r.take<double>();
    if (r.problem) return x;
    x.B = cu_q ? cu_q->size(0) - 1 : query.size(0);
    x.HQ = query.size(1);
    x.NQ = query.size(2);
    x.S = longest(cu_q, x.NQ);
    x.D = query.size(3);
    x.HKV = key.size(1);
    x.NK = key.size(2);
    x.T = longest(cu_k, x.NK);
    x.DV = value.size(3);
    x.N = prefix_key ? prefix_key->size(0) : 1;
    x.P = prefix_key ? prefix_key->size(2) : 0;
    r.need(x.D <= 256 && x.DV <= 256, "the kernels take heads of up to 256");
    r.need(x.HKV > 0 && x.HQ % x.HKV == 0, "query heads must be a multiple of key heads");
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

// Boxed kernels, in the calling convention of the stable ABI: arguments come on a stack, and nothing is returned.
void forward(StableIValue* stack, uint64_t, uint64_t) {
    Reader r(stack);
    prefix_attn::Forward f;
    f.args = arguments(r);
    f.out = r.array(r.tensor());
    f.lse = (float*)r.tensor().mutable_data_ptr();
    STD_TORCH_CHECK(!r.problem, r.problem);
    const prefix_attn::Kernels& k = kernels();
    const prefix_attn::Bank bank = prefix_attn::group_rows(f.args);
    const float* prefix = packed(k, f.args, false);
    torch::stable::parallel_for(0, k.forward_units(f.args), 1, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; unit++)
            k.forward(f, prefix, unit);
    });
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

}  // namespace

#define ARGUMENTS                                                                                                    \
    "Tensor query, Tensor key, Tensor value, Tensor? prefix_key, Tensor? prefix_value, Tensor? sinks, Tensor? ids, " \
    "Tensor? prefix_lengths, Tensor? prefix_start, Tensor? key_lengths, Tensor? cu_q, Tensor? cu_k, "                \
    "Tensor? key_mask, bool causal, int window, float scale, float softcap, "

STABLE_TORCH_LIBRARY(prefix_attn_cpu, m) {
    m.def("forward(" ARGUMENTS "Tensor(a!) out, Tensor(b!) lse) -> ()");
    m.def("backward(" ARGUMENTS
          "Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, Tensor(a!)? grad_query, Tensor(b!)? grad_key, "
          "Tensor(c!)? grad_value, Tensor(d!)? grad_prefix_key, Tensor(e!)? grad_prefix_value, int slots, "
          "Tensor(f!)? share) -> ()");
    m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(prefix_attn_cpu, CPU, m) {
    m.impl("forward", &forward);
    m.impl("backward", &backward);
}

STABLE_TORCH_LIBRARY_IMPL(prefix_attn_cpu, CompositeExplicitAutograd, m) {
    m.impl("isa", TORCH_BOX(&isa));
}

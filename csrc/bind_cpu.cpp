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

#include "args.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

namespace {

prefix_attn::Array array(const Tensor& t) {
    const ScalarType type = t.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                    "the kernels take float32, bfloat16 and float16");
    STD_TORCH_CHECK(t.dim() == 4, "the kernels take tensors of four dimensions");
    prefix_attn::Array x;
    x.data = t.const_data_ptr();
    x.batch = t.stride(0);
    x.head = t.stride(1);
    x.row = t.stride(2);
    x.type = type == ScalarType::Float      ? prefix_attn::Type::f32
             : type == ScalarType::BFloat16 ? prefix_attn::Type::bf16
                                            : prefix_attn::Type::f16;
    return x;
}

prefix_attn::Array array(const Maybe& t) {
    return t ? array(*t) : prefix_attn::Array{};
}

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

prefix_attn::Call call(const Tensor& query, const Tensor& key, const Tensor& value, const Maybe& prefix_key,
                       const Maybe& prefix_value, const Maybe& sinks, const Maybe& ids, const Maybe& prefix_lengths,
                       const Maybe& prefix_start, const Maybe& key_lengths, const Maybe& cu_q, const Maybe& cu_k,
                       const Maybe& key_mask, bool causal, int64_t window, double scale, double softcap) {
    prefix_attn::Call c;
    c.query = array(query);
    c.key = array(key);
    c.value = array(value);
    c.prefix_key = array(prefix_key);
    c.prefix_value = array(prefix_value);
    c.sinks = data<const float>(sinks);
    c.ids = data<const int64_t>(ids);
    c.prefix_lengths = data<const int64_t>(prefix_lengths);
    c.prefix_start = data<const int64_t>(prefix_start);
    c.key_lengths = data<const int64_t>(key_lengths);
    c.cu_q = data<const int64_t>(cu_q);
    c.cu_k = data<const int64_t>(cu_k);
    c.key_mask = data<const uint8_t>(key_mask);
    c.B = cu_q ? cu_q->size(0) - 1 : query.size(0);
    c.HQ = query.size(1);
    c.NQ = query.size(2);
    c.S = longest(cu_q, c.NQ);
    c.D = query.size(3);
    c.HKV = key.size(1);
    c.NK = key.size(2);
    c.T = longest(cu_k, c.NK);
    c.DV = value.size(3);
    c.N = prefix_key ? prefix_key->size(0) : 1;
    c.P = prefix_key ? prefix_key->size(2) : 0;
    STD_TORCH_CHECK(c.D <= 256 && c.DV <= 256, "the kernels take heads of up to 256");
    STD_TORCH_CHECK(c.HKV > 0 && c.HQ % c.HKV == 0, "query heads must be a multiple of key heads");
    c.causal = causal;
    c.window = window;
    c.scale = (float)scale;
    c.softcap = (float)softcap;
    return c;
}

const prefix_attn::Kernels& kernels() {
    const char* reason = "";
    const prefix_attn::Kernels* found = prefix_attn::pick(&reason);
    STD_TORCH_CHECK(found, reason);
    return *found;
}

// The packed prefix. The buffer is the calling thread's and only grows: fresh memory costs more than filling it. Where
// no row reads an entry it is not touched.
const float* packed(const prefix_attn::Kernels& k, const prefix_attn::Call& c, bool backward) {
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

int64_t forward(Tensor query, Tensor key, Tensor value, Maybe prefix_key, Maybe prefix_value, Maybe sinks, Maybe ids,
                Maybe prefix_lengths, Maybe prefix_start, Maybe key_lengths, Maybe cu_q, Maybe cu_k, Maybe key_mask,
                bool causal, int64_t window, double scale, double softcap, Tensor out, Tensor lse) {
    const prefix_attn::Kernels& k = kernels();
    prefix_attn::Forward f;
    f.call = call(query, key, value, prefix_key, prefix_value, sinks, ids, prefix_lengths, prefix_start, key_lengths,
                  cu_q, cu_k, key_mask, causal, window, scale, softcap);
    f.out = array(out);
    f.lse = (float*)lse.mutable_data_ptr();
    const float* prefix = packed(k, f.call, false);
    torch::stable::parallel_for(0, k.forward_units(f.call), 1, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; unit++)
            k.forward(f, prefix, unit);
    });
    return 0;
}

int64_t backward(Tensor query, Tensor key, Tensor value, Maybe prefix_key, Maybe prefix_value, Maybe sinks, Maybe ids,
                 Maybe prefix_lengths, Maybe prefix_start, Maybe key_lengths, Maybe cu_q, Maybe cu_k, Maybe key_mask,
                 bool causal, int64_t window, double scale, double softcap, Tensor out, Tensor lse, Tensor grad_out,
                 Maybe grad_lse, Maybe grad_query, Maybe grad_key, Maybe grad_value, Maybe grad_prefix_key,
                 Maybe grad_prefix_value, int64_t slots, Maybe share) {
    const prefix_attn::Kernels& k = kernels();
    prefix_attn::Backward f;
    f.call = call(query, key, value, prefix_key, prefix_value, sinks, ids, prefix_lengths, prefix_start, key_lengths,
                  cu_q, cu_k, key_mask, causal, window, scale, softcap);
    f.out = array(out);
    f.grad_out = array(grad_out);
    f.lse = (const float*)lse.const_data_ptr();
    f.grad_lse = data<const float>(grad_lse);
    f.grad_query = array(grad_query);
    f.grad_key = array(grad_key);
    f.grad_value = array(grad_value);
    f.grad_prefix_key = data<float>(grad_prefix_key);
    f.grad_prefix_value = data<float>(grad_prefix_value);
    f.slots = slots;
    f.share = data<float>(share);
    const float* prefix = packed(k, f.call, true);
    torch::stable::parallel_for(0, k.backward_units(f), 1, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; unit++)
            k.backward(f, prefix, unit);
    });
    return 0;
}

// The name of the instruction set that runs.
std::string isa() {
    return kernels().name;
}

}  // namespace

#define PA_CALL                                                                                                      \
    "Tensor query, Tensor key, Tensor value, Tensor? prefix_key, Tensor? prefix_value, Tensor? sinks, Tensor? ids, " \
    "Tensor? prefix_lengths, Tensor? prefix_start, Tensor? key_lengths, Tensor? cu_q, Tensor? cu_k, Tensor? "        \
    "key_mask, "                                                                                                     \
    "bool causal, int window, "                                                                                      \
    "float scale, float softcap, "

STABLE_TORCH_LIBRARY(prefix_attn_cpu, m) {
    m.def("forward(" PA_CALL "Tensor(a!) out, Tensor(b!) lse) -> int");
    m.def("backward(" PA_CALL
          "Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, Tensor(a!)? grad_query, Tensor(b!)? grad_key, "
          "Tensor(c!)? grad_value, Tensor(d!)? grad_prefix_key, Tensor(e!)? grad_prefix_value, int slots, Tensor(f!)? "
          "share) "
          "-> int");
    m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(prefix_attn_cpu, CPU, m) {
    m.impl("forward", TORCH_BOX(&forward));
    m.impl("backward", TORCH_BOX(&backward));
}

STABLE_TORCH_LIBRARY_IMPL(prefix_attn_cpu, CompositeExplicitAutograd, m) {
    m.impl("isa", TORCH_BOX(&isa));
}

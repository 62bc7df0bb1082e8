// Routing from logits on the CPU: for each token the keys of all experts, the top_k of them, and their weights. Threads
// take tokens one by one. Sums go over 32 partial sums, as a warp makes them on the GPU.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <numeric>
#include <vector>

#include "../routing.h"
#include "float_environment.h"
#include "parallel.h"

namespace jax_moe::cpu {
namespace {

using Method = RoutingMethodType;

// A row of bf16 or f32 elements.
class Floats {
 public:
  Floats(const Buffer& buffer, int64_t dtype, int64_t first)
      : wide_(dtype == int64_t(DataType::kFloat32)),
        data_(static_cast<const uint8_t*>(buffer.data) + first * (wide_ ? 4 : 2)) {}
  float operator[](int64_t i) const {
    uint32_t bits = 0;
    if (wide_) {
      std::memcpy(&bits, data_ + i * 4, 4);
    } else {
      uint16_t half;
      std::memcpy(&half, data_ + i * 2, 2);
      bits = uint32_t(half) << 16;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

 private:
  bool wide_;
  const uint8_t* data_;
};

float Sigmoid(float x) { return 1.f / (1.f + std::exp(-x)); }

float Sum(const float* values, int64_t count) {
  float partial[32] = {};
  for (int64_t i = 0; i < count; ++i) partial[i % 32] += values[i];
  for (int width = 16; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) partial[i] += partial[i + width];
  return partial[0];
}

// Whether index a comes before b: the greater key, NaN after everything, the smaller index among equals.
struct Before {
  const float* keys;
  bool operator()(int32_t a, int32_t b) const {
    const float x = keys[a], y = keys[b];
    if (std::isnan(x) || std::isnan(y)) return std::isnan(x) == std::isnan(y) ? a < b : std::isnan(y);
    return x != y ? x > y : a < b;
  }
};

// The state of one thread.
class Router {
 public:
  Router(const RoutingProblem& problem, const RoutingBuffers& buffers)
      : p_(problem), b_(buffers), keys_(p_.num_experts), scores_(p_.n_group), order_(p_.num_experts) {}

  void Route(int64_t token) {
    const Floats logits(b_.routing_logits, p_.logits_dtype, token * p_.num_experts);
    MakeKeys(logits);
    const int64_t count = ListCandidates();
    const auto end = order_.begin() + count;
    std::partial_sort(order_.begin(), order_.begin() + p_.top_k, end, Before{keys_.data()});
    auto* ids = static_cast<int32_t*>(b_.topk_ids.data) + token * p_.top_k;
    std::copy_n(order_.begin(), p_.top_k, ids);
    MakeWeights(logits, ids, static_cast<float*>(b_.topk_weights.data) + token * p_.top_k);
  }

 private:
  void MakeKeys(const Floats& logits) {
    const int64_t num = p_.num_experts;
    for (int64_t e = 0; e < num; ++e) keys_[e] = logits[e];
    switch (Method(p_.method)) {
      case Method::kDefault:
      case Method::kRenormalizeNaive:
        Softmax(keys_.data(), num);
        break;
      case Method::kDeepSeekV3:
      case Method::kMiniMax2:
      case Method::kSigmoidRenorm:
      case Method::kSigmoid:
        for (float& key : keys_) key = Sigmoid(key);
        break;
      case Method::kRenormalize:
      case Method::kLlama4:
      case Method::kTopK:
        break;
    }
    if (!p_.reads_bias()) return;
    const Floats bias(b_.routing_bias, p_.bias_dtype, 0);
    for (int64_t e = 0; e < num; ++e) keys_[e] += bias[e];
  }

  static void Softmax(float* values, int64_t count) {
    float top = values[0];
    for (int64_t i = 1; i < count; ++i) top = std::fmax(top, values[i]);
    for (int64_t i = 0; i < count; ++i) values[i] = std::exp(values[i] - top);
    const float sum = Sum(values, count);
    for (int64_t i = 0; i < count; ++i) values[i] /= sum;
  }

  // The experts of the kept groups, first in order_; returns how many there are.
  int64_t ListCandidates() {
    std::iota(order_.begin(), order_.end(), 0);
    if (p_.topk_group == p_.n_group) return p_.num_experts;
    const int64_t size = p_.group_size();
    for (int64_t g = 0; g < p_.n_group; ++g) {
      const auto first = order_.begin() + g * size;
      std::partial_sort(first, first + 2, first + size, Before{keys_.data()});
      scores_[g] = keys_[first[0]] + keys_[first[1]];
    }
    std::iota(order_.begin(), order_.begin() + p_.n_group, 0);
    std::partial_sort(order_.begin(), order_.begin() + p_.topk_group, order_.begin() + p_.n_group,
                      Before{scores_.data()});
    kept_.assign(order_.begin(), order_.begin() + p_.topk_group);
    auto next = order_.begin();
    for (const int32_t g : kept_) {
      std::iota(next, next + size, int32_t(g * size));
      next += size;
    }
    return next - order_.begin();
  }

  void MakeWeights(const Floats& logits, const int32_t* ids, float* weights) const {
    const int64_t top_k = p_.top_k;
    for (int64_t k = 0; k < top_k; ++k) weights[k] = p_.reads_bias() ? Sigmoid(logits[ids[k]]) : keys_[ids[k]];
    switch (Method(p_.method)) {
      case Method::kRenormalize:
        Softmax(weights, top_k);
        break;
      case Method::kLlama4:
        weights[0] = Sigmoid(weights[0]);
        break;
      case Method::kDeepSeekV3:
      case Method::kMiniMax2: {
        const float sum = Sum(weights, top_k) + 1e-20f;
        for (int64_t k = 0; k < top_k; ++k) weights[k] = weights[k] * float(p_.routed_scaling_factor) / sum;
        break;
      }
      case Method::kSigmoidRenorm:
        if (!p_.norm_topk_prob) break;
        [[fallthrough]];
      case Method::kRenormalizeNaive: {
        const float sum = Sum(weights, top_k);
        for (int64_t k = 0; k < top_k; ++k) weights[k] /= sum;
        break;
      }
      case Method::kDefault:
      case Method::kTopK:
      case Method::kSigmoid:
        break;
    }
  }

  const RoutingProblem& p_;
  const RoutingBuffers& b_;
  std::vector<float> keys_, scores_;  // [E], [n_group]
  std::vector<int32_t> order_, kept_;
};

}  // namespace

Status RouteLogits(const RoutingProblem& problem, const RoutingBuffers& buffers) try {
  if (Status s = CheckRouting(problem, buffers); !s.ok()) return s;
  const DefaultFloatEnvironment environment;
  constexpr int64_t kWorkPerExpert = 32;  // an exponential, a division, comparisons
  Parallel(problem.num_tokens, problem.num_experts * kWorkPerExpert, [&](WorkQueue& tokens) {
    Router router(problem, buffers);
    for (int64_t token; tokens.Next(&token);) router.Route(token);
  });
  return {};
} catch (const std::exception& e) {
  return Status::Internal(std::string("the CPU backend failed: ") + e.what());
}

}  // namespace jax_moe::cpu

// LeNet-5 (1x32x32 images, tanh, 2x2 mean pooling, ten classes) for CPUs with AVX2 or AVX-512: the projected-gradient
// attack, and the convolutional features with the gradient of their weights. native.py checks and calls it.
//
// Layout. A vector register holds ONE activation of kLanes DIFFERENT images, side by side: 8 with AVX2, 16 with
// AVX-512. Every operation of the network then works on whole registers, whatever the size of the layer, and no number
// ever moves between lanes. Activations are laid out [channel][row][column], each entry a register wide. Such a group
// of images runs through all its attack steps inside one Workspace (0.4 MB with AVX2, 0.8 MB with AVX-512: it fits
// the second-level cache) before the next group starts: PyTorch instead sends the whole batch through memory layer by
// layer.
//
// Speed. The inner loops keep a block of 10 to 12 sums in registers, enough to hide the latency of a fused
// multiply-add (two a cycle, four cycles each) and to use each loaded number more than once. One attack step is
// 1.67 MFLOP an image.
// Measured on one core of an AMD EPYC (Zen 5, 1 MB second-level cache), 20 attack steps on 128 images, best of eight
// runs on the idle machine: AVX2 42.2 ms (101 GFLOP/s), AVX-512 22.1 ms (193 GFLOP/s); AVX2 on two cores 21.4 ms.
// PGD-20 on 2,000 images in batches of 100, one thread: 0.42 s with AVX-512, 0.78 s with AVX2, against 7.5 s for
// torchattacks' PGD in PyTorch 2.15; a training step (forward, backward, one batch) 3.5 ms against 11.3 ms in PyTorch.
// The same layout and arithmetic in numba take 70 ms in place of 22.1 ms.
//
// Determinism. Groups are handed out to threads one by one, and an image's numbers depend on nothing outside its lane.
// Weight gradients are summed per group, and these sums in the order of the groups: results have the same bits however
// many threads work. Threads live for one call only, so no pool is left behind for fork() to break.
//
// Arithmetic is float32 with fused multiply-adds. NaN passes through the network as it does in PyTorch, except that a
// NaN gradient moves no pixel. The vector types are those of GCC and Clang; -ffast-math is neither needed nor wanted.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#define UNROLL _Pragma("GCC unroll 16")  // the sums become registers only once the loops over them are gone

namespace {

constexpr int kLanes = FRLKIT_LANES;
constexpr int kPixels = 32 * 32, kFeatures = 16 * 5 * 5, kClasses = 10;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

// The model's parameters, each contiguous, in PyTorch's order and layout; conv3 is a linear layer on 400 features.
struct Network {
  const float *conv1_weight, *conv1_bias, *conv2_weight, *conv2_bias, *conv3_weight, *conv3_bias;
  const float *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
};

// One group's activations and gradients, reused from step to step and from group to group.
struct Workspace {
  Lanes clean[kPixels], image[kPixels], image_grad[kPixels];
  Lanes conv1[6 * 28 * 28], pool1[6 * 14 * 14], pool1_grad[6 * 14 * 14];
  Lanes conv2[16 * 10 * 10], pool2[kFeatures], pool2_grad[kFeatures];
  Lanes conv3[120], conv3_grad[120], fc1[84], fc1_grad[84], logits[kClasses], target[kClasses];
};

// The gradient of the convolutions' parameters for one group, packed in the order of model.parameters().
struct FeatureGradient {
  float conv1_weight[6 * 25], conv1_bias[6], conv2_weight[16 * 6 * 25], conv2_bias[16];
};
constexpr int kGradientSize = sizeof(FeatureGradient) / sizeof(float);

inline Lanes broadcast(float value) { return value - Lanes{}; }

inline Lanes clamp(Lanes value, Lanes low, Lanes high) {  // a NaN value stays NaN
  value = high < value ? high : value;
  return low > value ? low : value;
}

inline float sum_of_lanes(Lanes value) {
  UNROLL for (int half = kLanes / 2; half > 0; half /= 2)
    UNROLL for (int lane = 0; lane < half; lane++) value[lane] += value[lane + half];
  return value[0];
}

// The rational approximation of Eigen and XLA, odd degree 13 over even degree 6; its error is below 3e-7.
inline Lanes tanh(Lanes x) {
  x = clamp(x, broadcast(-7.99881172f), broadcast(7.99881172f));  // beyond, tanh is 1 in float32
  const Lanes s = x * x;
  Lanes p = s * -2.76076847742355e-16f + 2.00018790482477e-13f;
  p = s * p + -8.60467152213735e-11f;
  p = s * p + 5.12229709037114e-08f;
  p = s * p + 1.48572235717979e-05f;
  p = s * p + 6.37261928935436e-04f;
  p = s * p + 4.89352455891786e-03f;
  Lanes q = s * 1.19825839466702e-06f + 1.18534705686654e-04f;
  q = s * q + 2.26843463243900e-03f;
  q = s * q + 4.89352518554385e-03f;
  return x * p / q;
}

// ---- Layers. Size is the side of a convolution's output, Size + 4 that of its input; the kernels are 5x5. -----------

// output = tanh(weight * input + bias), a block of OutBlock channels x ColumnBlock pixels of one row at a time.
template <int In, int Out, int Size, int OutBlock, int ColumnBlock>
void convolution_tanh(const Lanes* input, const float* weight, const float* bias, Lanes* output) {
  static_assert(Out % OutBlock == 0 && Size % ColumnBlock == 0);
  for (int out = 0; out < Out; out += OutBlock)
    for (int row = 0; row < Size; row++)
      for (int column = 0; column < Size; column += ColumnBlock) {
        Lanes sum[OutBlock][ColumnBlock];
        for (int o = 0; o < OutBlock; o++)
          for (int c = 0; c < ColumnBlock; c++) sum[o][c] = broadcast(bias[out + o]);
        for (int in = 0; in < In; in++)
          for (int ky = 0; ky < 5; ky++) {
            const Lanes* source = input + (in * (Size + 4) + row + ky) * (Size + 4) + column;
            const float* tap = weight + (out * In + in) * 25 + ky * 5;
            UNROLL for (int kx = 0; kx < 5; kx++)
              UNROLL for (int o = 0; o < OutBlock; o++)
                UNROLL for (int c = 0; c < ColumnBlock; c++) sum[o][c] += tap[o * In * 25 + kx] * source[c + kx];
          }
        for (int o = 0; o < OutBlock; o++)
          for (int c = 0; c < ColumnBlock; c++) output[((out + o) * Size + row) * Size + column + c] = tanh(sum[o][c]);
      }
}

template <int Channels, int Size>
void mean_pool(const Lanes* input, Lanes* output) {
  for (int row = 0; row < Channels * Size; row += 2)
    for (int column = 0; column < Size; column += 2) {
      const Lanes* corner = input + row * Size + column;
      *output++ = 0.25f * (corner[0] + corner[1] + corner[Size] + corner[Size + 1]);
    }
}

// From the gradient of the pooled values to that of the values before tanh, which replaces the activation: one array
// less in the cache. tanh' = 1 - tanh^2.
template <int Channels, int Size>
void mean_pool_tanh_backward(const Lanes* pooled_grad, Lanes* activation) {
  for (int row = 0; row < Channels * Size; row++)
    for (int column = 0; column < Size; column++) {
      Lanes& value = activation[row * Size + column];
      value = 0.25f * pooled_grad[row / 2 * (Size / 2) + column / 2] * (1.0f - value * value);
    }
}

// The gradient of a convolution's input. Columns are template arguments, so that the tests for the border, where
// fewer than 25 taps reach a pixel, are gone from the compiled loops.
template <int In, int Out, int Size, int InBlock, int ColumnBlock>
void convolution_input_gradient(const Lanes* output_grad, const float* weight, Lanes* input_grad) {
  constexpr int kSide = Size + 4;
  static_assert(In % InBlock == 0 && kSide % ColumnBlock == 0);
  for (int in = 0; in < In; in += InBlock)
    for (int row = 0; row < kSide; row++) {
      const auto column_block = [&]<int Block>(std::integral_constant<int, Block>) {
        constexpr int kColumn = Block * ColumnBlock;
        Lanes sum[InBlock][ColumnBlock] = {};
        for (int out = 0; out < Out; out++)
          for (int ky = std::max(0, row - Size + 1); ky <= std::min(4, row); ky++) {
            const Lanes* source = output_grad + (out * Size + row - ky) * Size + kColumn;
            const float* tap = weight + (out * In + in) * 25 + ky * 5;
            UNROLL for (int kx = 0; kx < 5; kx++)
              UNROLL for (int i = 0; i < InBlock; i++)
                UNROLL for (int c = 0; c < ColumnBlock; c++)
                  if (kColumn + c >= kx && kColumn + c - kx < Size) sum[i][c] += tap[i * 25 + kx] * source[c - kx];
          }
        for (int i = 0; i < InBlock; i++)
          for (int c = 0; c < ColumnBlock; c++) input_grad[((in + i) * kSide + row) * kSide + kColumn + c] = sum[i][c];
      };
      [&]<int... Block>(std::integer_sequence<int, Block...>) {
        (column_block(std::integral_constant<int, Block>{}), ...);
      }(std::make_integer_sequence<int, kSide / ColumnBlock>{});
    }
}

// The gradient of a convolution's weight and bias, summed over the lanes: five taps of two channels at a time.
template <int In, int Out, int Size>
void convolution_weight_gradient(const Lanes* input, const Lanes* output_grad, float* weight_grad, float* bias_grad) {
  for (int out = 0; out < Out; out += 2) {
    const Lanes* grad[2] = {output_grad + out * Size * Size, output_grad + (out + 1) * Size * Size};
    for (int o = 0; o < 2; o++) {
      Lanes sum = {};
      for (int pixel = 0; pixel < Size * Size; pixel++) sum += grad[o][pixel];
      bias_grad[out + o] = sum_of_lanes(sum);
    }
    for (int in = 0; in < In; in++)
      for (int ky = 0; ky < 5; ky++) {
        Lanes sum[2][5] = {};
        for (int row = 0; row < Size; row++)
          for (int column = 0; column < Size; column++) {
            const Lanes* source = input + (in * (Size + 4) + row + ky) * (Size + 4) + column;
            UNROLL for (int o = 0; o < 2; o++)
              UNROLL for (int kx = 0; kx < 5; kx++) sum[o][kx] += grad[o][row * Size + column] * source[kx];
          }
        for (int o = 0; o < 2; o++)
          for (int kx = 0; kx < 5; kx++)
            weight_grad[((out + o) * In + in) * 25 + ky * 5 + kx] = sum_of_lanes(sum[o][kx]);
      }
  }
}

template <int In, int Out, int Block, bool Tanh>
void linear(const Lanes* input, const float* weight, const float* bias, Lanes* output) {
  static_assert(Out % Block == 0);
  for (int out = 0; out < Out; out += Block) {
    Lanes sum[Block];
    for (int o = 0; o < Block; o++) sum[o] = broadcast(bias[out + o]);
    for (int in = 0; in < In; in++)
      UNROLL for (int o = 0; o < Block; o++) sum[o] += weight[(out + o) * In + in] * input[in];
    for (int o = 0; o < Block; o++) output[out + o] = Tanh ? tanh(sum[o]) : sum[o];
  }
}

// The gradient of a linear layer's input and, where that input is itself a tanh, of the values before it.
template <int In, int Out, int Block, bool Tanh>
void linear_input_gradient(const Lanes* output_grad, const float* weight, const Lanes* input, Lanes* input_grad) {
  static_assert(In % Block == 0);
  for (int in = 0; in < In; in += Block) {
    Lanes sum[Block] = {};
    for (int out = 0; out < Out; out++)
      UNROLL for (int i = 0; i < Block; i++) sum[i] += weight[out * In + in + i] * output_grad[out];
    for (int i = 0; i < Block; i++)
      input_grad[in + i] = Tanh ? sum[i] * (1.0f - input[in + i] * input[in + i]) : sum[i];
  }
}

// ---- The network, for one group of images ---------------------------------------------------------------------------

void features_forward(Workspace& w, const Network& net) {
  convolution_tanh<1, 6, 28, 6, 2>(w.image, net.conv1_weight, net.conv1_bias, w.conv1);
  mean_pool<6, 28>(w.conv1, w.pool1);
  convolution_tanh<6, 16, 10, 2, 5>(w.pool1, net.conv2_weight, net.conv2_bias, w.conv2);
  mean_pool<16, 10>(w.conv2, w.pool2);
}

void classifier_forward(Workspace& w, const Network& net) {
  linear<kFeatures, 120, 12, true>(w.pool2, net.conv3_weight, net.conv3_bias, w.conv3);
  linear<120, 84, 12, true>(w.conv3, net.fc1_weight, net.fc1_bias, w.fc1);
  linear<84, kClasses, kClasses, false>(w.fc1, net.fc2_weight, net.fc2_bias, w.logits);
}

// The logits become the gradient of KL(target || softmax(logits)), with a one-hot target that of the cross-entropy.
void divergence_gradient(Lanes* logits, const Lanes* target) {
  Lanes largest = logits[0], total = {};
  for (int k = 1; k < kClasses; k++) largest = logits[k] > largest ? logits[k] : largest;
  for (int k = 0; k < kClasses; k++) {
    logits[k] -= largest;
    for (int lane = 0; lane < kLanes; lane++) logits[k][lane] = std::exp(logits[k][lane]);
    total += logits[k];
  }
  for (int k = 0; k < kClasses; k++) logits[k] = logits[k] / total - target[k];
}

// The logits become the gradient of max_{k != y} z_k - z_y for a one-hot target; the first of equal rivals counts.
void margin_gradient(Lanes* logits, const Lanes* target) {
  for (int lane = 0; lane < kLanes; lane++) {
    int rival = -1;
    for (int k = 0; k < kClasses; k++)
      if (target[k][lane] == 0 && (rival < 0 || logits[k][lane] > logits[rival][lane])) rival = k;
    for (int k = 0; k < kClasses; k++) logits[k][lane] = static_cast<float>(k == rival) - target[k][lane];
  }
}

// From the gradient of the logits, which stands in their place, to that of the image.
void image_gradient(Workspace& w, const Network& net) {
  linear_input_gradient<84, kClasses, 12, true>(w.logits, net.fc2_weight, w.fc1, w.fc1_grad);
  linear_input_gradient<120, 84, 12, true>(w.fc1_grad, net.fc1_weight, w.conv3, w.conv3_grad);
  linear_input_gradient<kFeatures, 120, 10, false>(w.conv3_grad, net.conv3_weight, w.pool2, w.pool2_grad);
  mean_pool_tanh_backward<16, 10>(w.pool2_grad, w.conv2);
  convolution_input_gradient<6, 16, 10, 6, 2>(w.conv2, net.conv2_weight, w.pool1_grad);
  mean_pool_tanh_backward<6, 28>(w.pool1_grad, w.conv1);
  convolution_input_gradient<1, 6, 28, 1, 8>(w.conv1, net.conv1_weight, w.image_grad);
}

// ---- Batches --------------------------------------------------------------------------------------------------------

struct Group {
  int64_t index, first;  // the group's number; the image in its lane 0
  int filled;            // lanes with an image of their own; the others repeat the last one, and are not stored

  void load(const float* batch, int width, Lanes* rows) const {
    for (int lane = 0; lane < kLanes; lane++)
      for (int i = 0; i < width; i++) rows[i][lane] = batch[(first + std::min(lane, filled - 1)) * width + i];
  }
  void store(const Lanes* rows, int width, float* batch) const {
    for (int lane = 0; lane < filled; lane++)
      for (int i = 0; i < width; i++) batch[(first + lane) * width + i] = rows[i][lane];
  }
};

constexpr int64_t groups_in(int64_t images) { return (images + kLanes - 1) / kLanes; }

template <class Work>
void for_each_group(int64_t images, int threads, const Work& work) {
  std::atomic<int64_t> next = 0;
  const auto worker = [&] {
    const std::unique_ptr<Workspace> workspace(new Workspace);
    for (int64_t index; (index = next++) < groups_in(images);) {
      const int64_t first = index * kLanes;
      work(Group{index, first, static_cast<int>(std::min<int64_t>(kLanes, images - first))}, *workspace);
    }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min<int64_t>(threads, groups_in(images)); i++) others.emplace_back(worker);
  } catch (const std::system_error&) {  // the system grants no more threads: those there are take all the groups
  }
  worker();
  for (std::thread& other : others) other.join();
}

}  // namespace

// ---- What Python calls: contiguous float32 arrays, one row an image -------------------------------------------------

extern "C" {

int frlkit_lanes() { return kLanes; }

// `steps` times: image <- the projection of image + step_size * sign(gradient of the loss) on the eps-ball around the
// clean image and on [0, 1]. target: (count, 10) probabilities, one-hot for the margin; eps and step_size: (count,).
void frlkit_pgd(int64_t count, int threads, const Network* net, const float* clean, const float* start,
                const float* target, const float* eps, const float* step_size, int steps, int margin, float* result) {
  for_each_group(count, threads, [=](const Group& group, Workspace& w) {
    Lanes radius, step;
    const Lanes zero = {};
    group.load(eps, 1, &radius);
    group.load(step_size, 1, &step);
    group.load(clean, kPixels, w.clean);
    group.load(start, kPixels, w.image);
    group.load(target, kClasses, w.target);
    for (int t = 0; t < steps; t++) {
      features_forward(w, *net);
      classifier_forward(w, *net);
      (margin ? margin_gradient : divergence_gradient)(w.logits, w.target);
      image_gradient(w, *net);
      for (int i = 0; i < kPixels; i++) {
        const Lanes grad = w.image_grad[i];
        const Lanes moved = w.image[i] + (grad > zero ? step : grad < zero ? -step : zero);
        w.image[i] = clamp(clamp(moved, w.clean[i] - radius, w.clean[i] + radius), zero, broadcast(1));
      }
    }
    group.store(w.image, kPixels, result);
  });
}

// features: (count, 400), both convolutions with their tanh and pooling.
void frlkit_features(int64_t count, int threads, const Network* net, const float* images, float* features) {
  for_each_group(count, threads, [=](const Group& group, Workspace& w) {
    group.load(images, kPixels, w.image);
    features_forward(w, *net);
    group.store(w.pool2, kFeatures, features);
  });
}

// gradient: the convolutions' parameters, packed; group_gradients: scratch for one such row for each group of images.
// The forward pass runs again: keeping its activations would cost a batch's worth of memory for a small gain.
void frlkit_features_backward(int64_t count, int threads, const Network* net, const float* images,
                              const float* features_grad, FeatureGradient* group_gradients, float* gradient) {
  for_each_group(count, threads, [=](const Group& group, Workspace& w) {
    FeatureGradient& sums = group_gradients[group.index];
    group.load(images, kPixels, w.image);
    group.load(features_grad, kFeatures, w.pool2_grad);
    for (Lanes& grad : w.pool2_grad)
      for (int lane = group.filled; lane < kLanes; lane++) grad[lane] = 0;
    features_forward(w, *net);
    mean_pool_tanh_backward<16, 10>(w.pool2_grad, w.conv2);
    convolution_weight_gradient<6, 16, 10>(w.pool1, w.conv2, sums.conv2_weight, sums.conv2_bias);
    convolution_input_gradient<6, 16, 10, 6, 2>(w.conv2, net->conv2_weight, w.pool1_grad);
    mean_pool_tanh_backward<6, 28>(w.pool1_grad, w.conv1);
    convolution_weight_gradient<1, 6, 28>(w.image, w.conv1, sums.conv1_weight, sums.conv1_bias);
  });
  std::fill_n(gradient, kGradientSize, 0.0f);
  for (int64_t group = 0; group < groups_in(count); group++)
    for (int i = 0; i < kGradientSize; i++)
      gradient[i] += reinterpret_cast<const float*>(&group_gradients[group])[i];
}

}  // extern "C"

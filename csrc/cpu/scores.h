// Scores of int8: products of a few quantized queries and adjacent keys of a cache. Included by the
// files of the levels only, in an anonymous namespace, after a struct Dot (panels.h).

// Rows that are multiplied together, and held by one Queries.
constexpr int64_t kQueryRows = 8;
// Scores of a tile: whole vectors and groups of tokens may write beyond it.
constexpr int64_t kTileStride = kTokenTile + 64;

struct Queries {
  alignas(64) Dot::X of[kQueryRows * kMaxHead];

  void pack(const int8_t* q, int64_t rows) {
    for (int64_t i = 0; i < rows * kMaxHead; ++i) of[i] = static_cast<Dot::X>(q[i] + Dot::kX);
  }
};

constexpr int kScoreTokens = 4;

// kRows rows by kScoreTokens keys, whose rows are `k[0]`, `k[1]`, ...
template <int kRows>
inline void multiply_keys(const Dot::X* q, const int8_t* const (&k)[kScoreTokens], int64_t width,
                          int32_t* sums) {
  Dot::Sum acc[kRows][kScoreTokens] = {};
  Dot::Sum excess[kScoreTokens] = {};
  const auto step = [&](int64_t at, const auto& read_key) {
    Dot::WVector w[kScoreTokens];
    for (int n = 0; n < kScoreTokens; ++n) {
      w[n] = read_key(k[n] + at);
      excess[n] = Dot::ones_dot(excess[n], w[n]);
    }
    for (int r = 0; r < kRows; ++r) {
      const Dot::XVector x = Dot::read_x(q + r * kMaxHead + at);
      for (int n = 0; n < kScoreTokens; ++n) acc[r][n] = Dot::dot(acc[r][n], x, w[n]);
    }
  };
  int64_t at = 0;
  for (; at + Dot::kStep <= width; at += Dot::kStep) {
    step(at, [](const int8_t* from) { return Dot::read_w(from); });
  }
  if (at < width) {
    step(at, [&](const int8_t* from) { return Dot::read_w_some(from, width - at); });
  }
  int32_t found[kScoreTokens + 4], too_much[kScoreTokens + 4] = {};
  if constexpr (Dot::kX != 0) Dot::template totals<kScoreTokens>(excess, too_much);
  for (int r = 0; r < kRows; ++r) {
    Dot::template totals<kScoreTokens>(acc[r], found);
    for (int n = 0; n < kScoreTokens; ++n) sums[r * kTileStride + n] = found[n] - too_much[n];
  }
}

// sums[r][t] = q[r] . k[t] for `tokens` keys, which are `width` bytes apart.
inline void multiply_queries(const Queries& q, int64_t rows, const int8_t* k, int64_t width,
                             int64_t tokens, int32_t* sums) {
  for (int64_t t = 0; t < tokens; t += kScoreTokens) {
    const int8_t* keys[kScoreTokens];
    for (int64_t n = 0; n < kScoreTokens; ++n) {
      keys[n] = k + (t + n < tokens ? t + n : tokens - 1) * width;
    }
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) {
      multiply_keys<2>(q.of + r * kMaxHead, keys, width, sums + r * kTileStride + t);
    }
    if (r < rows) multiply_keys<1>(q.of + r * kMaxHead, keys, width, sums + r * kTileStride + t);
  }
}

// Attention of a few queries to a part of an int8 cache. Included by the files of the levels only,
// in an anonymous namespace, after scores.h or scores512.h.
//
// Every level gives the same bits: each sum has a fixed order, and lanes are channels or, for the
// sum of the weights, every 16th token.

// --- exp ---------------------------------------------------------------------------------------

// The larger of each two, and b where a is NaN.
inline Floats larger_number(Floats a, Floats b) {
#if defined(__AVX512F__)
  return bits_as<Floats>(_mm512_max_ps(bits_as<__m512>(a), bits_as<__m512>(b)));
#elif defined(__AVX2__)
  return bits_as<Floats>(_mm256_max_ps(bits_as<__m256>(a), bits_as<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

// exp(x) for x <= 0, within 4 units of 2^-24 of itself; 0 below -87, NaN for NaN.
inline Floats exp_of(Floats x) {
  constexpr float kRound = 12582912.0f;  // adding it rounds to an integer, in the last bits
  const Floats shifted = fused_multiply_add(x, broadcast(1.44269504f), broadcast(kRound));
  const Floats n = shifted - kRound;
  // ln 2 in two parts. The product with the first is exact.
  Floats r = fused_multiply_add(n, broadcast(-0.693359375f), x);
  r = fused_multiply_add(n, broadcast(2.12194440e-4f), r);
  // The Taylor series: |r| <= ln 2 / 2, so the first term left out is below 2^-27.
  Floats p = broadcast(1.0f / 5040.0f);
  constexpr float kRest[] = {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f,
                             1.0f / 2.0f,   1.0f,          1.0f};
  for (float coefficient : kRest) p = fused_multiply_add(p, r, broadcast(coefficient));
  const Words exponent = bits_as<Words>(shifted) << 23;
  const Floats y = bits_as<Floats>(bits_as<Words>(p) + exponent);
  return x >= -87.0f ? y : (x == x ? Floats{} : x);
}

inline float exp_of(float x) { return exp_of(broadcast(x))[0]; }

// --- weights -----------------------------------------------------------------------------------

constexpr float kLowest = -3.40282347e38f;
constexpr int64_t kSums = 16;  // of the weights: token i of a tile belongs to sum i % 16

// What the rows of a tile share.
struct Tile {
  int64_t columns;  // <= kTokenTile
  alignas(64) float k_scale[kTileStride], v_scale[kTileStride];
};

// Which columns of a tile a row may attend to.
struct Allowed {
  bool all, any;
  alignas(64) int32_t of[kTileStride];  // 0 or -1, unless all are allowed

  // Columns [low, high) of the tile, which starts at `begin`, and what the mask says.
  void set(const Part& part, int64_t begin, int64_t columns, int64_t row) {
    const AttentionParams& p = *part.params;
    const int64_t token = row % p.tokens;
    const int64_t newest = part.newest - (p.tokens - 1 - token) - begin;
    const int64_t high = newest + 1 < columns ? newest + 1 : columns;
    int64_t low = p.window > 0 ? newest - p.window + 1 : 0;
    low = low < 0 ? 0 : low;
    any = low < high;
    all = low == 0 && high == columns && columns % kSums == 0 && p.mask == nullptr;
    if (all || !any) return;
    std::memset(of, 0, static_cast<size_t>(round_up(columns, kSums)) * sizeof *of);
    if (p.mask == nullptr) {
      for (int64_t i = low; i < high; ++i) of[i] = -1;
      return;
    }
    const int64_t group = p.heads / p.cache.heads, head = part.head * group + row / p.tokens;
    const uint8_t* mask = p.mask + part.sequence * p.mask_batch_stride + head * p.mask_head_stride +
                          token * p.mask_token_stride + begin * p.mask_column_stride;
    int32_t found = 0;
    for (int64_t i = low; i < high; ++i) {
      of[i] = -static_cast<int32_t>(mask[i * p.mask_column_stride] != 0);
      found |= of[i];
    }
    any = found != 0;
  }
};

// The scores of a row, in place of their sums, and the largest one.
template <bool kAll>
inline float make_scores(const Tile& tile, const Allowed& allowed, float q_scale, float* scores) {
  Floats most = broadcast(kLowest);
  for (int64_t i = 0; i < tile.columns; i += kLanes) {
    Floats s = __builtin_convertvector(read<Ints>(scores + i), Floats);
    s = s * read<Floats>(tile.k_scale + i) * q_scale;
    write(scores + i, s);
    if constexpr (!kAll) s = read<Ints>(allowed.of + i) != 0 ? s : broadcast(kLowest);
    most = larger_number(s, most);
  }
  float found = most[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) found = most[lane] > found ? most[lane] : found;
  return found;
}

// exp(score - most) times the scale of its value, in place of each score. Returns the sum of the
// former.
template <bool kAll>
inline float make_weights(const Tile& tile, const Allowed& allowed, float most, float* scores) {
  Floats sums[kSums / kLanes] = {};
  for (int64_t i = 0; i < tile.columns; i += kSums) {
    for (int64_t j = 0; j < kSums / kLanes; ++j) {
      const int64_t at = i + j * kLanes;
      Floats p = exp_of(read<Floats>(scores + at) - most);
      Floats weight = p * read<Floats>(tile.v_scale + at);
      if constexpr (!kAll) {
        const Ints mine = read<Ints>(allowed.of + at);
        p = mine != 0 ? p : Floats{};
        weight = mine != 0 ? weight : Floats{};
      }
      sums[j] += p;
      write(scores + at, weight);
    }
  }
  float of[kSums];
  for (int64_t j = 0; j < kSums / kLanes; ++j) write(of + j * kLanes, sums[j]);
  for (int64_t h = kSums / 2; h > 0; h /= 2) {
    for (int64_t i = 0; i < h; ++i) of[i] += of[i + h];
  }
  return of[0];
}

// --- values ------------------------------------------------------------------------------------

// Lanes of a row of values.
inline Floats load_values(const int8_t* v) {
#if defined(__AVX512F__)
  return bits_as<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(read<__m128i>(v))));
#elif defined(__AVX2__)
  return bits_as<Floats>(_mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(v)))));
#else
  return __builtin_convertvector(__builtin_convertvector(read<Bytes>(v), Ints), Floats);
#endif
}

// Channels of a row that are added up together, in vectors: all sums stay in registers.
#if defined(__AVX512F__)
constexpr int kMostVectors = 4;
#elif defined(__AVX2__)
constexpr int kMostVectors = 2;
#else
constexpr int kMostVectors = 4;
#endif

// sums[r][c] += weights[r][t] * v[t][c] for kVectors vectors of channels, token after token.
template <int kRows, int kVectors>
inline void add_channels(const int8_t* v, int64_t width, int64_t tokens, const float* weights,
                         float* sums) {
  Floats acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kVectors; ++j) acc[r][j] = read<Floats>(sums + r * kMaxHead + j * kLanes);
  }
  for (int64_t t = 0; t < tokens; ++t, v += width) {
    Floats values[kVectors];
    for (int j = 0; j < kVectors; ++j) values[j] = load_values(v + j * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Floats weight = broadcast(weights[r * kTileStride + t]);
      for (int j = 0; j < kVectors; ++j) {
        acc[r][j] = fused_multiply_add(weight, values[j], acc[r][j]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kVectors; ++j) write(sums + r * kMaxHead + j * kLanes, acc[r][j]);
  }
}

template <int kRows>
inline void add_values(const int8_t* v, int64_t width, int64_t tokens, const float* weights,
                       float* sums) {
  int64_t at = 0;
  for (; at + kMostVectors * kLanes <= width; at += kMostVectors * kLanes) {
    add_channels<kRows, kMostVectors>(v + at, width, tokens, weights, sums + at);
  }
  if constexpr (kMostVectors * kLanes > kHeadMultiple) {
    for (; at < width; at += kLanes) {
      add_channels<kRows, 1>(v + at, width, tokens, weights, sums + at);
    }
  }
}

inline void add_values(int64_t rows, const int8_t* v, int64_t width, int64_t tokens,
                       const float* weights, float* sums) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    add_values<4>(v, width, tokens, weights + r * kTileStride, sums + r * kMaxHead);
  }
  weights += r * kTileStride;
  sums += r * kMaxHead;
  if (rows - r == 3) add_values<3>(v, width, tokens, weights, sums);
  if (rows - r == 2) add_values<2>(v, width, tokens, weights, sums);
  if (rows - r == 1) add_values<1>(v, width, tokens, weights, sums);
}

// --- parts -------------------------------------------------------------------------------------

// The scales of a run of columns, or 1 where the scales are those of channels.
inline void copy_scales(const float* scales, int64_t count, float* to) {
  if (scales != nullptr) {
    std::memcpy(to, scales, static_cast<size_t>(count) * sizeof *to);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = 1.0f;
  }
}

// Calls f(slots, column of the tile) for the runs of columns [begin, begin + columns).
template <typename F>
inline void for_runs(const Part& part, int64_t begin, int64_t columns, const F& f) {
  const KvCache& cache = part.params->cache;
  for (int64_t done = 0; done < columns;) {
    Slots run = slots_of(cache, part.sequence, part.oldest + begin + done, columns - done);
    // The block of a token that does not exist may be any.
    run.block = run.block < 0 ? 0 : run.block < cache.blocks ? run.block : cache.blocks - 1;
    f(run, done);
    done += run.count;
  }
}

// Attention of up to kQueryRows rows to a tile, merged with the states of the tiles before it.
inline void attend_tile(const Part& part, int64_t first_row, int64_t rows, const Queries& q,
                        int64_t begin, const Tile& tile) {
  const KvCache& cache = part.params->cache;
  const int64_t k_width = padded_head(cache.k.dim), v_width = padded_head(cache.v.dim);
  alignas(64) float scores[kQueryRows * kTileStride];
  alignas(64) float sums[kQueryRows * kMaxHead];
  for_runs(part, begin, tile.columns, [&](const Slots& run, int64_t at) {
    multiply_queries(q, rows, run.at(cache.k, part.head), k_width, run.count,
                     reinterpret_cast<int32_t*>(scores) + at);
  });
  float factors[kQueryRows];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first_row + r;
    float* const own = scores + r * kTileStride;
    float* const state = part.states + row * state_floats(cache.v.dim);
    std::memset(sums + r * kMaxHead, 0, static_cast<size_t>(v_width) * sizeof *sums);
    factors[r] = 1.0f;
    Allowed allowed;
    allowed.set(part, begin, tile.columns, row);
    if (!allowed.any) {
      std::memset(own, 0, static_cast<size_t>(tile.columns) * sizeof *own);
      continue;
    }
    const float q_scale = part.q_scale[row];
    float most = allowed.all ? make_scores<true>(tile, allowed, q_scale, own)
                             : make_scores<false>(tile, allowed, q_scale, own);
    most = most > state[0] ? most : state[0];
    const float sum = allowed.all ? make_weights<true>(tile, allowed, most, own)
                                  : make_weights<false>(tile, allowed, most, own);
    factors[r] = state[0] == most ? 1.0f : exp_of(state[0] - most);
    state[0] = most;
    state[1] = state[1] * factors[r] + sum;
  }
  for_runs(part, begin, tile.columns, [&](const Slots& run, int64_t at) {
    add_values(rows, run.at(cache.v, part.head), v_width, run.count, scores + at, sums);
  });
  for (int64_t r = 0; r < rows; ++r) {
    float* const state = part.states + (first_row + r) * state_floats(cache.v.dim) + kStateHead;
    for (int64_t i = 0; i < v_width; i += kLanes) {
      const Floats before = read<Floats>(state + i) * factors[r];
      write(state + i, before + read<Floats>(sums + r * kMaxHead + i));
    }
  }
}

void attend(const Part& part) {
  const KvCache& cache = part.params->cache;
  const int64_t floats = state_floats(cache.v.dim);
  for (int64_t row = 0; row < part.rows; ++row) {
    float* const state = part.states + row * floats;
    std::memset(state, 0, static_cast<size_t>(floats) * sizeof *state);
    state[0] = -__builtin_inff();  // nothing is allowed yet
  }
  Queries q;
  Tile tile;
  for (int64_t begin = part.begin; begin < part.end; begin += kTokenTile) {
    tile.columns = part.end - begin < kTokenTile ? part.end - begin : kTokenTile;
    for_runs(part, begin, tile.columns, [&](const Slots& run, int64_t at) {
      copy_scales(run.scale(cache.k, part.head), run.count, tile.k_scale + at);
      copy_scales(run.scale(cache.v, part.head), run.count, tile.v_scale + at);
    });
    for (int64_t row = 0; row < part.rows; row += kQueryRows) {
      const int64_t rows = part.rows - row < kQueryRows ? part.rows - row : kQueryRows;
      if (begin == part.begin || part.rows > kQueryRows) q.pack(part.q + row * kMaxHead, rows);
      attend_tile(part, row, rows, q, begin, tile);
    }
  }
}

// --- outputs -----------------------------------------------------------------------------------

// Adds up the parts of a query, divides by the sum of the weights, and undoes rotation and factors.
void merge_parts(const Merge& merge) {
  const AttentionParams& p = *merge.params;
  const int64_t dim = p.cache.v.dim, padded = padded_head(dim);
  alignas(64) float y[kMaxHead] = {};
  float most = -__builtin_inff(), sum = 0.0f;
  for (int64_t i = 0; i < merge.parts; ++i) {
    const float own = merge.states[i * merge.stride];
    most = own > most ? own : most;
  }
  for (int64_t i = 0; i < merge.parts; ++i) {
    const float* const state = merge.states + i * merge.stride;
    if (state[0] == -__builtin_inff()) continue;
    const float factor = exp_of(state[0] - most);
    sum = sum + state[1] * factor;
    for (int64_t c = 0; c < padded; c += kLanes) {
      write(y + c, fused_multiply_add(read<Floats>(state + kStateHead + c), broadcast(factor),
                                      read<Floats>(y + c)));
    }
  }
  if (most > -__builtin_inff()) {
    for (int64_t c = 0; c < padded; c += kLanes) write(y + c, read<Floats>(y + c) / sum);
  }
  if (p.rotation != 0)
    rotate(y, dim, p.rotation, [&](int64_t i, auto) { return read<Floats>(y + i); });
  const float inverse = p.rotation != 0 ? 1.0f / static_cast<float>(p.rotation) : 1.0f;
  const float* const smooth = p.v_smooth == nullptr ? nullptr : p.v_smooth + merge.head * dim;
  visit_float(p.dtype, [&](auto type) {
    constexpr DType kDType = decltype(type)::value;
    char* const to = const_cast<char*>(row_of<kDType>(p.y, dim, merge.row));
    for_vectors(dim, [&](int64_t i, auto count) {
      Floats v = read<Floats>(y + i) * inverse;
      if (smooth != nullptr) v = v * load_lanes<DType::kFloat32>(smooth, i, count);
      store_lanes<kDType>(to, i, v, count);
    });
  });
}

// Conversions of eight fp16 values by F16C, for reduce_kernels.inl; expects ODY_TARGET.
// Eight lanes under AVX-512 too: memory is the limit there, and GCC's 16-lane intrinsics warn about themselves.

#include <immintrin.h>

#define ODY_HALF_LANES 8

namespace odysseus {
namespace {

ODY_TARGET inline void widen_half(void* sum, const void* source, bool add) {
  __m256 value = _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(source)));
  if (add) value = _mm256_add_ps(_mm256_loadu_ps(static_cast<const float*>(sum)), value);
  _mm256_storeu_ps(static_cast<float*>(sum), value);
}

ODY_TARGET inline void narrow_half(void* out, const void* sum) {
  const __m256 value = _mm256_loadu_ps(static_cast<const float*>(sum));
  _mm_storeu_si128(static_cast<__m128i*>(out), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace
}  // namespace odysseus

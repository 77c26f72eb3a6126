/* Measures what this machine can do at most, so that a kernel's speed can be given as a share of it.
 *
 *   limits fma ISA THREADS SECONDS     prints GFLOP/s (fp32, a multiply-add counts as two) of a register-only FMA loop;
 *                                      ISA is avx512 or avx2
 *   limits read THREADS SECONDS MIB    prints GB/s (10^9 bytes) of reading MIB mebibytes from memory again and again
 *
 * Each measurement runs many short rounds on THREADS threads that start together, and prints the median round: kernels
 * are timed by their median too, and a clock that is faster for a moment belongs to neither. Exit status 3: this
 * processor lacks the instructions.
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define MAX_THREADS 1024
#define FMA_STEPS 200000L

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* Enough independent chains to hide the latency of two FMA units, few enough to stay in registers. */
__attribute__((target("avx512f"))) static float fma_avx512(long steps) {
    __m512 acc[24], x = _mm512_set1_ps(1.0000001f), y = _mm512_set1_ps(1e-9f);
    for (int i = 0; i < 24; i++) acc[i] = _mm512_set1_ps((float)i);
    for (long k = 0; k < steps; k++) {
#pragma GCC unroll 24
        for (int i = 0; i < 24; i++) acc[i] = _mm512_fmadd_ps(acc[i], x, y);
    }
    for (int i = 1; i < 24; i++) acc[0] = _mm512_add_ps(acc[0], acc[i]);
    return _mm512_reduce_add_ps(acc[0]);
}

__attribute__((target("avx2,fma"))) static float fma_avx2(long steps) {
    __m256 acc[12], x = _mm256_set1_ps(1.0000001f), y = _mm256_set1_ps(1e-9f);
    float out[8];
    for (int i = 0; i < 12; i++) acc[i] = _mm256_set1_ps((float)i);
    for (long k = 0; k < steps; k++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) acc[i] = _mm256_fmadd_ps(acc[i], x, y);
    }
    for (int i = 1; i < 12; i++) acc[0] = _mm256_add_ps(acc[0], acc[i]);
    _mm256_storeu_ps(out, acc[0]);
    return out[0];
}

/* Eight sums: one chain of adds would be slower than memory. */
__attribute__((target("avx2"))) static float read_avx2(const char *data, long bytes) {
    __m256i sum[8];
    int out[8];
    memset(sum, 0, sizeof sum);
    for (long i = 0; i + 256 <= bytes; i += 256) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++)
            sum[j] = _mm256_add_epi32(sum[j], _mm256_load_si256((const __m256i *)(data + i + 32 * j)));
    }
    for (int j = 1; j < 8; j++) sum[0] = _mm256_add_epi32(sum[0], sum[j]);
    _mm256_storeu_si256((__m256i *)out, sum[0]);
    return (float)out[0];
}

enum kind { FMA_AVX512, FMA_AVX2, READ };

struct worker {
    pthread_t thread;
    double start, end;
    char *data;
};

static enum kind kind;
static long chunk_bytes;
static int threads, stop;
static double seconds;
static double *rates;
static long rounds, room;
static volatile float sink;
static pthread_barrier_t barrier;
static struct worker workers[MAX_THREADS];

static void finish_round(double flop_or_bytes, double deadline) {
    double start = workers[0].start, end = workers[0].end;
    for (int i = 1; i < threads; i++) {
        if (workers[i].start < start) start = workers[i].start;
        if (workers[i].end > end) end = workers[i].end;
    }
    if (rounds == room) {
        double *more = realloc(rates, (room = room ? 2 * room : 1024) * sizeof *rates);
        if (!more) perror("realloc"), exit(1);
        rates = more;
    }
    rates[rounds++] = flop_or_bytes * threads / (end - start) / 1e9;
    stop = now() > deadline;
}

/* A core each: woken from a barrier together, threads may else stay on one core for seconds. */
static void pin(int index) {
    cpu_set_t allowed, own;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
    index %= CPU_COUNT(&allowed);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &allowed) || index--) continue;
        CPU_ZERO(&own);
        CPU_SET(cpu, &own);
        sched_setaffinity(0, sizeof own, &own);
        return;
    }
}

static void *work(void *arg) {
    struct worker *self = arg;
    pin(self - workers);
    /* Written by the thread that reads it: the pages then lie near its core, and none is the shared zero page. */
    if (kind == READ) memset(self->data, 1, chunk_bytes);
    double per_thread = kind == READ ? (double)chunk_bytes : FMA_STEPS * (kind == FMA_AVX512 ? 24.0 * 32 : 12.0 * 16);
    double deadline = now() + seconds;
    while (!stop) {
        pthread_barrier_wait(&barrier);
        self->start = now();
        if (kind == FMA_AVX512) sink = fma_avx512(FMA_STEPS);
        else if (kind == FMA_AVX2) sink = fma_avx2(FMA_STEPS);
        else sink = read_avx2(self->data, chunk_bytes);
        self->end = now();
        if (pthread_barrier_wait(&barrier) == PTHREAD_BARRIER_SERIAL_THREAD) finish_round(per_thread, deadline);
        pthread_barrier_wait(&barrier); /* everyone sees the same `stop` */
    }
    return NULL;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int run(void) {
    char *data = NULL;
    if (threads < 1 || threads > MAX_THREADS) return 2;
    if (kind == READ) {
        data = mmap(NULL, chunk_bytes * threads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (data == MAP_FAILED) return perror("mmap"), 1;
        madvise(data, chunk_bytes * threads, MADV_HUGEPAGE); /* else page walks are measured, not memory */
    }
    if (pthread_barrier_init(&barrier, NULL, threads)) return perror("pthread_barrier_init"), 1;
    for (int i = 0; i < threads; i++) {
        workers[i].data = data ? data + chunk_bytes * i : NULL;
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i])) return perror("pthread_create"), 1;
    }
    for (int i = 0; i < threads; i++) pthread_join(workers[i].thread, NULL);
    qsort(rates, rounds, sizeof *rates, by_size);
    printf("%.6f\n", rates[rounds / 2]);
    return 0;
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 3;
    if (!strcmp(argv[1], "fma")) {
        kind = strcmp(argv[2], "avx512") ? FMA_AVX2 : FMA_AVX512;
        if (kind == FMA_AVX512 && !__builtin_cpu_supports("avx512f")) return 3;
        threads = atoi(argv[3]);
        seconds = atof(argv[4]);
    } else {
        kind = READ;
        threads = atoi(argv[2]);
        seconds = atof(argv[3]);
        if (threads < 1) return 2;
        chunk_bytes = (atol(argv[4]) << 20) / threads & ~4095L;
    }
    return run();
}

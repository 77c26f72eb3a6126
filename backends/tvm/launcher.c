/* The process-wide launcher behind every compiled model's parallel loops.
 *
 * Generated code calls launch(lambda, cdata, num_task) for each parallel loop. The lambda splits its loop range by env->num_task and runs
 * the share named by task_id. Two routes run the tasks:
 *   openmp   on the OpenMP team that torch already has: no second pool, no fight with its spinning workers;
 *   pthread  on a pool of our own, where torch has no libgomp, and in a forked child, where libgomp would wait for threads that are gone.
 * A call of a model holds its OpenMP team from its first loop to its end: members spin between loops, which costs a tenth of
 * starting the team anew.
 * On both routes every team member pulls task ids from one counter. The result is therefore right whatever the size of the team that
 * turns up, and a slow core does not hold the others back.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define CACHE_LINE 64
#define TASKS_PER_THREAD 8 /* enough slack for a core that runs at half speed, and still few pulls per loop */
#define MAX_THREADS 1024
#define SPINS 2000 /* pauses before a waiting thread sleeps: some 20 to 100 microseconds, longer than the gap between two kernels */

typedef struct { void *sync; int32_t num_task; } Env;
typedef int (*Lambda)(int task_id, Env *env, void *cdata);

typedef struct {
  Lambda lambda;
  void *cdata;
  int num_task;
  int workers;                          /* pthread route: how many workers may help */
  _Alignas(CACHE_LINE) atomic_int next; /* written by all: kept off the line that all read */
  atomic_int rc;
} Job;

enum { ROUTE_PTHREAD, ROUTE_OPENMP };
static atomic_int route = ROUTE_PTHREAD;
static atomic_int forked = 0;
static _Thread_local int threads = 1;

static void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static void (*gomp_parallel_start)(void (*)(void *), void *, unsigned);
static void (*gomp_parallel_end)(void);
static int (*omp_in_parallel)(void);

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield" ::: "memory");
#else
  sched_yield();
#endif
}

/* Run tasks until none is left. The first task that fails stops the pulling, and its code is the launch's result. */
static void pull(void *argument) {
  Job *job = argument;
  Env env = {NULL, job->num_task};
  for (;;) {
    int id = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
    if (id >= job->num_task) return;
    int rc = job->lambda(id, &env, job->cdata);
    if (rc) {
      int none = 0;
      atomic_compare_exchange_strong(&job->rc, &none, rc);
      atomic_store(&job->next, job->num_task);
    }
  }
}

/* `gate` says which launch is on: number of the launch (high 32 bits), OPEN, and how many workers are inside (low 31 bits).
 * A worker may touch the job, which lives on the launching thread's stack, only after it has entered an open gate. The launcher closes
 * the gate when no task is left and waits for those inside; a worker that comes late finds it closed. */
#define OPEN (UINT64_C(1) << 31)
#define INSIDE(gate) ((gate) & (OPEN - 1))
#define NUMBER(gate) ((gate) >> 32)

static int has_work(uint64_t gate, uint64_t last) { return (gate & OPEN) && NUMBER(gate) != last; }

static uint64_t next_gate(uint64_t gate) {
  uint64_t next = (NUMBER(gate) + 1) & UINT32_MAX; /* launches count from 1 */
  return (next ? next : 1) << 32 | OPEN;
}

/* ---- OpenMP route: the team of a call ---------------------------------------------------------------------------------------------- */

typedef struct {
  Job *job; /* guarded by gate */
  int held, started;
  _Alignas(CACHE_LINE) _Atomic uint64_t gate;
  atomic_int over;
} Team;
static _Thread_local Team team_of_call;

static void serve(void *argument) {
  Team *team = argument;
  for (uint64_t last = 0;;) {
    uint64_t gate;
    for (int i = 0; !has_work(gate = atomic_load(&team->gate), last); i++) {
      if (atomic_load(&team->over)) return;
      if (i < SPINS) relax();
      else sched_yield();
    }
    if (!atomic_compare_exchange_strong(&team->gate, &gate, gate + 1)) continue;
    last = NUMBER(gate);
    pull(team->job);
    atomic_fetch_sub(&team->gate, 1);
  }
}

static void launch_on_team(Team *team, Job *job, int threads) {
  if (!team->started) {
    team->started = 1;
    atomic_store(&team->gate, 0);
    atomic_store(&team->over, 0);
    gomp_parallel_start(serve, team, (unsigned)threads);
  }
  team->job = job;
  atomic_store(&team->gate, next_gate(atomic_load(&team->gate)));
  pull(job);
  uint64_t gate = atomic_fetch_and(&team->gate, ~OPEN) & ~OPEN;
  for (int i = 0; INSIDE(gate); i++) {
    if (i < SPINS) relax();
    else sched_yield();
    gate = atomic_load(&team->gate);
  }
}

/* ---- pthread route --------------------------------------------------------------------------------------------------------------- */

static struct {
  atomic_int busy;  /* one launch at a time; a second caller runs its own tasks itself */
  int size;         /* workers alive; guarded by busy */
  Job *job;         /* guarded by gate */
  atomic_int sleepers;
  _Alignas(CACHE_LINE) _Atomic uint64_t gate;
  pthread_mutex_t mutex;
  pthread_cond_t wake, done;
} pool = {.mutex = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

/* Wait until a launch newer than `last` is open; returns the gate as it was then. */
static uint64_t wait_for_work(uint64_t last) {
  for (int i = 0; i < SPINS; i++) {
    uint64_t gate = atomic_load(&pool.gate);
    if (has_work(gate, last)) return gate;
    relax();
  }
  pthread_mutex_lock(&pool.mutex);
  atomic_fetch_add(&pool.sleepers, 1); /* before the check below: launch() opens the gate first and looks for sleepers next */
  uint64_t gate;
  while (!has_work(gate = atomic_load(&pool.gate), last)) pthread_cond_wait(&pool.wake, &pool.mutex);
  atomic_fetch_sub(&pool.sleepers, 1);
  pthread_mutex_unlock(&pool.mutex);
  return gate;
}

static void *worker(void *argument) {
  int index = (int)(intptr_t)argument;
  uint64_t last = 0;
  for (;;) {
    uint64_t gate = wait_for_work(last);
    if (!atomic_compare_exchange_strong(&pool.gate, &gate, gate + 1)) continue;
    last = NUMBER(gate);
    if (index < pool.job->workers) pull(pool.job);
    gate = atomic_fetch_sub(&pool.gate, 1) - 1;
    if (!(gate & OPEN) && INSIDE(gate) == 0) { /* the launcher may be asleep, waiting for the last one out */
      pthread_mutex_lock(&pool.mutex);
      pthread_cond_signal(&pool.done);
      pthread_mutex_unlock(&pool.mutex);
    }
  }
  return NULL;
}

/* Start workers up to `wanted`. When the system refuses more, the pool stays smaller and the launcher runs more of the tasks. */
static void grow(int wanted) {
  if (pool.size >= wanted) return;
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before); /* signals stay with the application's threads */
  while (pool.size < wanted) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)pool.size)) break;
    pthread_detach(thread);
    pool.size++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void close_gate(void) {
  uint64_t gate = atomic_fetch_and(&pool.gate, ~OPEN) & ~OPEN;
  for (int i = 0; INSIDE(gate) && i < SPINS; i++) {
    relax();
    gate = atomic_load(&pool.gate);
  }
  if (!INSIDE(gate)) return;
  pthread_mutex_lock(&pool.mutex);
  while (INSIDE(atomic_load(&pool.gate))) pthread_cond_wait(&pool.done, &pool.mutex);
  pthread_mutex_unlock(&pool.mutex);
}

static void launch_on_pool(Job *job) {
  if (atomic_exchange(&pool.busy, 1)) {
    pull(job);
    return;
  }
  grow(job->workers);
  pool.job = job;
  atomic_store(&pool.gate, next_gate(atomic_load(&pool.gate)));
  if (atomic_load(&pool.sleepers)) {
    pthread_mutex_lock(&pool.mutex);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.mutex);
  }
  pull(job);
  close_gate();
  atomic_store(&pool.busy, 0);
}

/* Only the thread that forked lives on in the child: libgomp's workers and ours are gone, and our locks may be held by nobody. */
static void in_child(void) {
  atomic_store(&route, ROUTE_PTHREAD);
  atomic_store(&forked, 1);
  atomic_store(&pool.busy, 0);
  atomic_store(&pool.sleepers, 0);
  atomic_store(&pool.gate, 0);
  pool.size = 0;
  pthread_mutex_init(&pool.mutex, NULL);
  pthread_cond_init(&pool.wake, NULL);
  pthread_cond_init(&pool.done, NULL);
}

__attribute__((constructor)) static void at_load(void) { pthread_atfork(NULL, NULL, in_child); }

/* ---- what the generated code calls --------------------------------------------------------------------------------------------- */

/* Run all tasks of a parallel loop and return 0, or the code of a task that failed. `num_task` is 0 when the loop leaves it to us. */
EXPORT int planish_parallel_launch(Lambda lambda, void *cdata, int num_task) {
  int team = threads;
  int openmp = atomic_load_explicit(&route, memory_order_acquire) == ROUTE_OPENMP;
  if (team > 1 && openmp && !team_of_call.started && omp_in_parallel()) team = 1; /* inside a region already: its team has the cores */
  int tasks = num_task > 0 ? num_task : team > 1 ? TASKS_PER_THREAD * team : 1;
  Job job = {.lambda = lambda, .cdata = cdata, .num_task = tasks, .workers = team - 1};
  if (team == 1) pull(&job);
  else if (openmp && team_of_call.held) launch_on_team(&team_of_call, &job, team);
  else if (openmp) gomp_parallel(pull, &job, (unsigned)team, 0);
  else launch_on_pool(&job);
  return atomic_load(&job.rc);
}

/* Scratch memory of a task. A thread keeps its blocks and gives them to its next task, so that they stay in its cache; they are freed
 * when the thread ends. Tasks nest at most a few allocations, which are freed in any order. */
#define BLOCKS 32
typedef struct { void *memory; uint64_t bytes; int used; } Block;
static _Thread_local Block blocks[BLOCKS];
static _Thread_local int blocks_watched = 0;
static pthread_key_t blocks_key;

static void free_blocks(void *unused) {
  (void)unused;
  for (int i = 0; i < BLOCKS; i++) free(blocks[i].memory), blocks[i] = (Block){0};
}

__attribute__((constructor)) static void make_blocks_key(void) { pthread_key_create(&blocks_key, free_blocks); }

EXPORT void *planish_alloc_workspace(int device_type, int device_id, uint64_t bytes, int dtype_code, int dtype_bits) {
  (void)device_type, (void)device_id, (void)dtype_code, (void)dtype_bits;
  Block *best = NULL;
  for (int i = 0; i < BLOCKS; i++) {
    Block *b = &blocks[i];
    if (!b->used && (!best || (b->bytes >= bytes && (best->bytes < bytes || b->bytes < best->bytes)))) best = b;
  }
  if (!best) return NULL;
  if (best->bytes < bytes) {
    free(best->memory);
    *best = (Block){0};
    if (posix_memalign(&best->memory, CACHE_LINE, bytes)) return best->memory = NULL;
    best->bytes = bytes;
    if (!blocks_watched) blocks_watched = !pthread_setspecific(blocks_key, blocks);
  }
  best->used = 1;
  return best->memory;
}

EXPORT int planish_free_workspace(int device_type, int device_id, void *memory) {
  (void)device_type, (void)device_id;
  for (int i = 0; i < BLOCKS; i++)
    if (blocks[i].memory == memory) blocks[i].used = 0;
  return 0;
}

/* ---- what the runtime calls ---------------------------------------------------------------------------------------------------- */

/* Number of threads for this thread's next launches. */
EXPORT void planish_set_threads(int n) { threads = n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : n; }

/* Around the calls of one model's function: its loops share a team. */
EXPORT void planish_begin(void) { team_of_call.held = 1; }

EXPORT void planish_end(void) {
  team_of_call.held = 0;
  if (!team_of_call.started) return;
  team_of_call.started = 0;
  atomic_store(&team_of_call.over, 1);
  gomp_parallel_end();
}

/* Take the OpenMP runtime that torch's own calls reach: one in the global scope if there is any (a preloaded one wins there too), else
 * the one `torch_library`, already loaded, depends on. Writes that runtime's file name into `file`.
 * Returns 0 when the openmp route is on, 1 when torch has no OpenMP, 2 when its runtime is not libgomp. */
EXPORT int planish_use_openmp(const char *torch_library, char *file, size_t size) {
  file[0] = 0;
  void *symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  if (!symbol) {
    void *torch = dlopen(torch_library, RTLD_LAZY | RTLD_NOLOAD);
    if (torch) symbol = dlsym(torch, "GOMP_parallel");
  }
  Dl_info info;
  if (!symbol || !dladdr(symbol, &info)) return 1;
  strncpy(file, info.dli_fname, size - 1);
  file[size - 1] = 0;
  const char *slash = strrchr(info.dli_fname, '/');
  if (strncmp(slash ? slash + 1 : info.dli_fname, "libgomp", 7)) return 2;
  void *runtime = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  if (!runtime) return 1;
  *(void **)&omp_in_parallel = dlsym(runtime, "omp_in_parallel");
  *(void **)&gomp_parallel_start = dlsym(runtime, "GOMP_parallel_start");
  *(void **)&gomp_parallel_end = dlsym(runtime, "GOMP_parallel_end");
  if (!omp_in_parallel || !gomp_parallel_start || !gomp_parallel_end) return 2;
  *(void **)&gomp_parallel = symbol;
  atomic_store_explicit(&route, ROUTE_OPENMP, memory_order_release);
  return 0;
}

EXPORT int planish_is_openmp(void) { return atomic_load(&route) == ROUTE_OPENMP; }

/* Whether this process was forked off after the launcher was loaded. */
EXPORT int planish_is_forked(void) { return atomic_load(&forked); }

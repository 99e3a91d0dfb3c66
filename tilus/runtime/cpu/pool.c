// The threads that run the blocks of kernels, shared by all kernels of a process.
//
// One launch at a time is open. Each thread has a share of the blocks, neighbours, so that it reads memory in long runs. A
// worker joins the launch, takes chunks of its share until none is left, then of the others' shares, and leaves.
// The caller takes part, then closes the launch and waits for those that joined: a worker that was too slow to wake up
// costs nothing. Idle workers spin for SPIN_NS, so that one launch after the other finds them awake, and then sleep.

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#define MAX_WORKERS 1023
#define STACK_NBYTES (64u << 20)
#define SPIN_NS 80000
#define CHUNKS_PER_THREAD 8  // enough to even out threads of different speed

typedef void (*blocks_fn)(const uint64_t *args, const int32_t *grid, int64_t first, int64_t last);

// What Python prepares for a launch, in one buffer: 8-byte slots except for the grid.
struct launch {
    blocks_fn blocks;
    int64_t num_threads;
    int32_t grid[4];  // the last one pads
    uint64_t args[];
};

struct worker {
    _Alignas(128) pthread_mutex_t mutex;
    pthread_cond_t wake;
    atomic_bool asleep;
    int64_t index;
};

// `state` of the open launch: its number, whether it may still be joined, and how many workers are in it.
#define NUMBER(state) ((state) >> 32)
#define OPEN (UINT64_C(1) << 31)
#define JOINED(state) ((state) & (OPEN - 1))

static struct {
    pthread_mutex_t launching;  // held by the one thread whose launch is open
    pthread_mutex_t ending;     // with `ended`: for a caller that waits long for its workers
    pthread_cond_t ended;
    atomic_bool caller_asleep;
    int64_t num_workers, limit;  // `limit`: what the system grants
    // The launch. Written while it is closed and no worker is in it.
    blocks_fn blocks;
    const uint64_t *args;
    const int32_t *grid;
    int64_t chunk, num_shares;
    _Alignas(128) _Atomic uint64_t state;
} pool;

// The blocks from `next` to `end` that nobody has taken yet. The caller's share is the first.
static struct share {
    _Alignas(128) _Atomic int64_t next;
    int64_t end;
} shares[MAX_WORKERS + 1];

static struct worker workers[MAX_WORKERS];

static void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void take_blocks(int64_t own) {
    const int64_t chunk = pool.chunk, num_shares = pool.num_shares;
    for (int64_t offset = 0; offset < num_shares; offset++) {
        struct share *share = &shares[(own + offset) % num_shares];
        for (;;) {
            const int64_t first = atomic_fetch_add_explicit(&share->next, chunk, memory_order_relaxed);
            if (first >= share->end) break;
            const int64_t last = first + chunk < share->end ? first + chunk : share->end;
            pool.blocks(pool.args, pool.grid, first, last);
        }
    }
}

static bool is_new(uint64_t state, uint64_t last_number) { return (state & OPEN) && NUMBER(state) != last_number; }

// Wait until the caller wakes this worker, unless there is a launch that it has not seen.
static void sleep_until_woken(struct worker *self, uint64_t last_number) {
    pthread_mutex_lock(&self->mutex);
    // `asleep` is set before `state` is read, and the caller does the opposite: one of them sees the other.
    atomic_store(&self->asleep, true);
    if (!is_new(atomic_load(&pool.state), last_number)) pthread_cond_wait(&self->wake, &self->mutex);
    atomic_store(&self->asleep, false);
    pthread_mutex_unlock(&self->mutex);
}

// The state in which a launch that this worker has not seen is open. A worker that wakes up too late for one spins again,
// to be there for the next.
static uint64_t next_launch(struct worker *self, uint64_t last_number) {
    for (;;) {
        const int64_t start = now_ns();
        for (int spins = 1; spins % 32 != 0 || now_ns() - start <= SPIN_NS; spins++) {
            const uint64_t state = atomic_load(&pool.state);
            if (is_new(state, last_number)) return state;
            pause_cpu();
        }
        sleep_until_woken(self, last_number);
    }
}

static bool join(uint64_t state) {
    const uint64_t number = NUMBER(state);
    while ((state & OPEN) && NUMBER(state) == number)
        if (atomic_compare_exchange_weak(&pool.state, &state, state + 1)) return true;
    return false;
}

static void leave(void) {
    const uint64_t state = atomic_fetch_sub(&pool.state, 1) - 1;
    if (JOINED(state) == 0 && !(state & OPEN) && atomic_load(&pool.caller_asleep)) {
        pthread_mutex_lock(&pool.ending);
        pthread_cond_signal(&pool.ended);
        pthread_mutex_unlock(&pool.ending);
    }
}

static void *work(void *argument) {
    struct worker *self = argument;
    uint64_t last_number = 0;
    for (;;) {
        const uint64_t state = next_launch(self, last_number);
        last_number = NUMBER(state);
        if (!join(state)) continue;
        if (self->index + 1 < pool.num_shares) take_blocks(self->index + 1);
        leave();
    }
    return 0;
}

// Start workers until there are `wanted`; fewer when the system does not grant them, which is slower but not wrong.
static void start_workers(int64_t wanted) {
    if (wanted > pool.limit) wanted = pool.limit;
    if (pool.num_workers >= wanted) return;
    sigset_t all, before;  // signals are for the threads of Python
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_NBYTES);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (pool.num_workers < wanted) {
        struct worker *worker = &workers[pool.num_workers];
        pthread_mutex_init(&worker->mutex, 0);
        pthread_cond_init(&worker->wake, 0);
        atomic_store(&worker->asleep, false);
        worker->index = pool.num_workers;
        pthread_t thread;
        if (pthread_create(&thread, &attributes, work, worker) != 0) {
            pool.limit = pool.num_workers;
            break;
        }
        pool.num_workers++;
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

static void wake_workers(int64_t count) {
    for (int64_t index = 0; index < count; index++) {
        struct worker *worker = &workers[index];
        if (!atomic_load(&worker->asleep)) continue;
        pthread_mutex_lock(&worker->mutex);
        pthread_cond_signal(&worker->wake);
        pthread_mutex_unlock(&worker->mutex);
    }
}

static void wait_for_workers(void) {
    const int64_t start = now_ns();
    for (int spins = 1; JOINED(atomic_load(&pool.state)) != 0; spins++) {
        pause_cpu();
        if (spins % 32 != 0 || now_ns() - start <= SPIN_NS) continue;
        pthread_mutex_lock(&pool.ending);
        atomic_store(&pool.caller_asleep, true);
        while (JOINED(atomic_load(&pool.state)) != 0) pthread_cond_wait(&pool.ended, &pool.ending);
        atomic_store(&pool.caller_asleep, false);
        pthread_mutex_unlock(&pool.ending);
        return;
    }
}

// Run all blocks on at most `num_threads` threads, the calling one among them; returns when they are done.
// A launch from another thread waits for its turn.
void tilus_run(blocks_fn blocks, const uint64_t *args, const int32_t *grid, int64_t num_blocks, int64_t num_threads) {
    if (num_threads > num_blocks) num_threads = num_blocks;
    if (num_threads <= 1) {
        if (num_blocks > 0) blocks(args, grid, 0, num_blocks);
        return;
    }
    pthread_mutex_lock(&pool.launching);
    start_workers(num_threads - 1);
    const int64_t chunk = num_blocks / (num_threads * CHUNKS_PER_THREAD);
    pool.blocks = blocks;
    pool.args = args;
    pool.grid = grid;
    pool.chunk = chunk > 1 ? chunk : 1;
    pool.num_shares = 1 + (num_threads - 1 < pool.num_workers ? num_threads - 1 : pool.num_workers);
    const int64_t size = num_blocks / pool.num_shares, rest = num_blocks % pool.num_shares;
    for (int64_t index = 0, first = 0; index < pool.num_shares; index++) {
        atomic_store_explicit(&shares[index].next, first, memory_order_relaxed);
        first += size + (index < rest);
        shares[index].end = first;
    }
    const uint64_t number = NUMBER(atomic_load_explicit(&pool.state, memory_order_relaxed)) + 1;
    atomic_store(&pool.state, number << 32 | OPEN);
    wake_workers(pool.num_shares - 1);
    take_blocks(0);
    atomic_fetch_and(&pool.state, ~OPEN);
    wait_for_workers();
    pthread_mutex_unlock(&pool.launching);
}

// The same from a prepared buffer. More blocks than can be counted are as many as can be: they never end.
void tilus_launch(const struct launch *launch) {
    const int32_t *grid = launch->grid;
    int64_t num_blocks = (int64_t)grid[0] * grid[1];
    if (__builtin_mul_overflow(num_blocks, (int64_t)grid[2], &num_blocks)) num_blocks = INT64_MAX / 2;
    tilus_run(launch->blocks, launch->args, grid, num_blocks, launch->num_threads);
}

// Launches one after the other.
void tilus_launch_all(const struct launch *const *launches, int64_t count) {
    for (int64_t index = 0; index < count; index++) tilus_launch(launches[index]);
}

// A forked child has none of the workers, and whatever was locked stays so: it starts anew.
static void reset(void) {
    pthread_mutex_init(&pool.launching, 0);
    pthread_mutex_init(&pool.ending, 0);
    pthread_cond_init(&pool.ended, 0);
    atomic_store(&pool.caller_asleep, false);
    atomic_store(&pool.state, 0);
    pool.num_workers = 0;
    pool.limit = MAX_WORKERS;
}

__attribute__((constructor)) static void set_up(void) {
    reset();
    pthread_atfork(0, 0, reset);
}

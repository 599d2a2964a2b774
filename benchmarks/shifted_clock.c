/* A wall clock that is wrong by CLOCK_SHIFT seconds, in every process that loads this library first:

       cc -shared -fPIC -o shifted_clock.so shifted_clock.c
       LD_PRELOAD=$PWD/shifted_clock.so CLOCK_SHIFT=600 date

   As on a machine whose clock is wrong, nothing else changes: monotonic clocks stay as they are, and whoever waits
   until a time of the wall clock waits as long as it would with a right one. So the deadlines of such waits are shifted
   back before the system sees them. A function that takes deadlines of any clock is not told of which one they are;
   those of a monotonic clock count from the machine's start, and are smaller than any of today's. Linux with glibc. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define LONGEST_UPTIME 1000000000 /* seconds, 31 years; the wall clock has passed it in 2001 */

static time_t shift; /* in seconds */

__attribute__((constructor)) static void read_shift(void) {
    const char *text = getenv("CLOCK_SHIFT");
    shift = text ? atol(text) : 0;
}

/* The function that would be called without this library. Of pthread_cond_timedwait the C library has two versions,
   of which the older one has another layout of its argument. */
static void *next(const char *name) {
    void *found = dlvsym(RTLD_NEXT, name, "GLIBC_2.3.2");
    return found ? found : dlsym(RTLD_NEXT, name);
}

/* `result name(parameters)` calls `true_name` of the same type, which is looked up once. */
#define REPLACED(result, name, ...)            \
    typedef result (*name##_type)(__VA_ARGS__); \
    static name##_type true_##name(void) {      \
        static name##_type found;               \
        if (!found) found = (name##_type)next(#name); \
        return found;                           \
    }                                           \
    result name(__VA_ARGS__)

static int is_wall(clockid_t clock) { return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE; }

/* The deadline in true time, in `room`. */
static const struct timespec *in_true_time(const struct timespec *deadline, struct timespec *room) {
    if (!deadline || deadline->tv_sec < LONGEST_UPTIME) return deadline;
    *room = *deadline;
    room->tv_sec -= shift;
    return room;
}

REPLACED(int, clock_gettime, clockid_t clock, struct timespec *now) {
    int code = true_clock_gettime()(clock, now);
    if (code == 0 && is_wall(clock)) now->tv_sec += shift;
    return code;
}

REPLACED(int, gettimeofday, struct timeval *restrict now, void *restrict zone) {
    int code = true_gettimeofday()(now, zone);
    if (code == 0) now->tv_sec += shift;
    return code;
}

REPLACED(time_t, time, time_t *where) {
    time_t now = true_time()(NULL) + shift;
    if (where) *where = now;
    return now;
}

REPLACED(int, timespec_get, struct timespec *now, int base) {
    int found = true_timespec_get()(now, base);
    if (found == TIME_UTC) now->tv_sec += shift;
    return found;
}

REPLACED(int, clock_nanosleep, clockid_t clock, int flags, const struct timespec *until, struct timespec *left) {
    struct timespec room;
    int is_deadline = (flags & TIMER_ABSTIME) && is_wall(clock);
    return true_clock_nanosleep()(clock, flags, is_deadline ? in_true_time(until, &room) : until, left);
}

REPLACED(int, pthread_cond_timedwait, pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
         const struct timespec *restrict deadline) {
    struct timespec room;
    return true_pthread_cond_timedwait()(condition, mutex, in_true_time(deadline, &room));
}

REPLACED(int, pthread_cond_clockwait, pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
         clockid_t clock, const struct timespec *restrict deadline) {
    struct timespec room;
    return true_pthread_cond_clockwait()(condition, mutex, clock, in_true_time(deadline, &room));
}

REPLACED(int, pthread_mutex_timedlock, pthread_mutex_t *restrict mutex, const struct timespec *restrict deadline) {
    struct timespec room;
    return true_pthread_mutex_timedlock()(mutex, in_true_time(deadline, &room));
}

REPLACED(int, pthread_mutex_clocklock, pthread_mutex_t *restrict mutex, clockid_t clock,
         const struct timespec *restrict deadline) {
    struct timespec room;
    return true_pthread_mutex_clocklock()(mutex, clock, in_true_time(deadline, &room));
}

REPLACED(int, pthread_rwlock_timedrdlock, pthread_rwlock_t *restrict lock, const struct timespec *restrict deadline) {
    struct timespec room;
    return true_pthread_rwlock_timedrdlock()(lock, in_true_time(deadline, &room));
}

REPLACED(int, pthread_rwlock_timedwrlock, pthread_rwlock_t *restrict lock, const struct timespec *restrict deadline) {
    struct timespec room;
    return true_pthread_rwlock_timedwrlock()(lock, in_true_time(deadline, &room));
}

REPLACED(int, sem_timedwait, sem_t *restrict semaphore, const struct timespec *restrict deadline) {
    struct timespec room;
    return true_sem_timedwait()(semaphore, in_true_time(deadline, &room));
}

REPLACED(int, sem_clockwait, sem_t *restrict semaphore, clockid_t clock, const struct timespec *restrict deadline) {
    struct timespec room;
    return true_sem_clockwait()(semaphore, clock, in_true_time(deadline, &room));
}

REPLACED(int, timerfd_settime, int timer, int flags, const struct itimerspec *new, struct itimerspec *old) {
    struct itimerspec changed = *new;
    if ((flags & TFD_TIMER_ABSTIME) && changed.it_value.tv_sec >= LONGEST_UPTIME) changed.it_value.tv_sec -= shift;
    return true_timerfd_settime()(timer, flags, &changed, old);
}

/* Some programs, Ray's among them, ask the kernel for the clock and for waits themselves. */
typedef long (*syscall_type)(long, ...);

long syscall(long number, ...) {
    static syscall_type true_syscall;
    long given[6];
    struct timespec room;
    va_list list;
    va_start(list, number);
    for (int index = 0; index < 6; index++) given[index] = va_arg(list, long);
    va_end(list);
    if (!true_syscall) true_syscall = (syscall_type)next("syscall");
    if (number == SYS_futex && (given[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET && (given[1] & FUTEX_CLOCK_REALTIME))
        given[3] = (long)in_true_time((const struct timespec *)given[3], &room);
    long code = true_syscall(number, given[0], given[1], given[2], given[3], given[4], given[5]);
    if (number == SYS_clock_gettime && code == 0 && is_wall((clockid_t)given[0]))
        ((struct timespec *)given[1])->tv_sec += shift;
    return code;
}

/* Fails, or kills the process at, chosen system calls below a folder; loaded with LD_PRELOAD.
 *
 * Python's functions, HDF5, Arrow and torch all reach the system through these functions of libc.
 * The file that FAILING_CALLS names is mapped by every process of a tree, so that its calls are
 * counted together; benchmarks/failing_calls.py describes its layout. Functions that libc itself
 * calls inside (the reads of a FILE) are not seen, except fopen.
 *
 * gcc -shared -fPIC -O1 -o failing_calls.so failing_calls.c -ldl
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#undef open
#undef open64
#undef openat
#undef openat64

enum { WRITE, FSYNC, RENAME, OPEN, READ, MKDIR, UNLINK, TRUNCATE, LINK, KINDS };

struct shared {
  int armed;      /* bits of the kinds that are counted; 0: none */
  int error;      /* errno of a failing call; 0: the process is killed instead */
  int all_after;  /* whether the calls after the one that fails fail too */
  int padding;
  long at;        /* number of the call that fails, from 1; 0: none does */
  long seen;      /* calls counted so far */
  long of[KINDS]; /* the same by kind */
  long failed;    /* calls failed so far */
  char below[1024];
  char path[1024]; /* of the first call that failed */
};

static struct shared *shared;

__attribute__((constructor)) static void map_shared(void) {
  const char *name = getenv("FAILING_CALLS");
  int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
  int fd = name ? real(name, O_RDWR | O_CLOEXEC) : -1;
  if (fd < 0) return;
  void *at = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (at != MAP_FAILED) shared = at;
  close(fd);
}

static int fails(int kind, const char *path) {
  if (strncmp(path, shared->below, strlen(shared->below))) return 0;
  __sync_add_and_fetch(&shared->of[kind], 1);
  long number = __sync_add_and_fetch(&shared->seen, 1);
  if (!shared->at || number < shared->at || (number > shared->at && !shared->all_after)) return 0;
  if (__sync_add_and_fetch(&shared->failed, 1) == 1) {
    strncpy(shared->path, path, sizeof shared->path - 1);
  }
  if (!shared->error) {
    kill(getpid(), SIGKILL);
    pause();
  }
  errno = shared->error;
  return 1;
}

static int counted(int kind) { return shared && (shared->armed & (1 << kind)) && shared->below[0]; }

static int fails_fd(int kind, int fd) {
  if (!counted(kind)) return 0;
  char link[64], path[4096];
  int before = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  errno = before;
  if (n < 0) return 0;
  path[n] = 0;
  return fails(kind, path);
}

static int fails_at(int kind, int folder, const char *name) {
  if (!counted(kind) || !name) return 0;
  if (name[0] == '/') return fails(kind, name);
  char link[64], path[8192];
  int before = errno;
  if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
  else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
  ssize_t n = readlink(link, path, 4095);
  errno = before;
  if (n < 0) return 0;
  snprintf(path + n, sizeof path - n, "/%s", name);
  return fails(kind, path);
}

#define REAL(result, name, ...) \
  static result (*real)(__VA_ARGS__); \
  if (!real) real = dlsym(RTLD_NEXT, name)

#define ON_FD(kind, result, function, types, arguments, fd) \
  result function types { \
    static result (*real) types; \
    if (!real) real = dlsym(RTLD_NEXT, #function); \
    if (fails_fd(kind, fd)) return -1; \
    return real arguments; \
  }

ON_FD(WRITE, ssize_t, write, (int f, const void *b, size_t n), (f, b, n), f)
ON_FD(WRITE, ssize_t, pwrite, (int f, const void *b, size_t n, off_t o), (f, b, n, o), f)
ON_FD(WRITE, ssize_t, pwrite64, (int f, const void *b, size_t n, off64_t o), (f, b, n, o), f)
ON_FD(WRITE, ssize_t, writev, (int f, const struct iovec *v, int n), (f, v, n), f)
ON_FD(WRITE, ssize_t, sendfile, (int f, int g, off_t *o, size_t n), (f, g, o, n), f)
ON_FD(WRITE, ssize_t, sendfile64, (int f, int g, off64_t *o, size_t n), (f, g, o, n), f)
ON_FD(WRITE, ssize_t, copy_file_range,
      (int g, off64_t *p, int f, off64_t *o, size_t n, unsigned int x), (g, p, f, o, n, x), f)
ON_FD(READ, ssize_t, read, (int f, void *b, size_t n), (f, b, n), f)
ON_FD(READ, ssize_t, pread, (int f, void *b, size_t n, off_t o), (f, b, n, o), f)
ON_FD(READ, ssize_t, pread64, (int f, void *b, size_t n, off64_t o), (f, b, n, o), f)
ON_FD(READ, ssize_t, readv, (int f, const struct iovec *v, int n), (f, v, n), f)
ON_FD(READ, ssize_t, preadv, (int f, const struct iovec *v, int n, off_t o), (f, v, n, o), f)
ON_FD(READ, ssize_t, preadv64, (int f, const struct iovec *v, int n, off64_t o), (f, v, n, o), f)
ON_FD(READ, ssize_t, __read_chk, (int f, void *b, size_t n, size_t m), (f, b, n, m), f)
ON_FD(READ, ssize_t, __pread_chk, (int f, void *b, size_t n, off_t o, size_t m), (f, b, n, o, m), f)
ON_FD(READ, ssize_t, __pread64_chk, (int f, void *b, size_t n, off64_t o, size_t m),
      (f, b, n, o, m), f)
ON_FD(FSYNC, int, fsync, (int f), (f), f)
ON_FD(FSYNC, int, fdatasync, (int f), (f), f)
ON_FD(TRUNCATE, int, ftruncate, (int f, off_t n), (f, n), f)
ON_FD(TRUNCATE, int, ftruncate64, (int f, off64_t n), (f, n), f)

#define ON_NAME(kind, result, failure, function, types, arguments, folder, name) \
  result function types { \
    static result (*real) types; \
    if (!real) real = dlsym(RTLD_NEXT, #function); \
    if (fails_at(kind, folder, name)) return failure; \
    return real arguments; \
  }

ON_NAME(TRUNCATE, int, -1, truncate, (const char *p, off_t n), (p, n), AT_FDCWD, p)
ON_NAME(TRUNCATE, int, -1, truncate64, (const char *p, off64_t n), (p, n), AT_FDCWD, p)
ON_NAME(RENAME, int, -1, rename, (const char *a, const char *b), (a, b), AT_FDCWD, b)
ON_NAME(RENAME, int, -1, renameat, (int d, const char *a, int e, const char *b), (d, a, e, b), e, b)
ON_NAME(RENAME, int, -1, renameat2, (int d, const char *a, int e, const char *b, unsigned int x),
        (d, a, e, b, x), e, b)
ON_NAME(UNLINK, int, -1, unlink, (const char *p), (p), AT_FDCWD, p)
ON_NAME(UNLINK, int, -1, rmdir, (const char *p), (p), AT_FDCWD, p)
ON_NAME(UNLINK, int, -1, unlinkat, (int d, const char *p, int x), (d, p, x), d, p)
ON_NAME(MKDIR, int, -1, mkdir, (const char *p, mode_t m), (p, m), AT_FDCWD, p)
ON_NAME(MKDIR, int, -1, mkdirat, (int d, const char *p, mode_t m), (d, p, m), d, p)
ON_NAME(LINK, int, -1, link, (const char *a, const char *b), (a, b), AT_FDCWD, b)
ON_NAME(LINK, int, -1, linkat, (int d, const char *a, int e, const char *b, int x), (d, a, e, b, x),
        e, b)
ON_NAME(OPEN, FILE *, NULL, fopen, (const char *p, const char *m), (p, m), AT_FDCWD, p)
ON_NAME(OPEN, FILE *, NULL, fopen64, (const char *p, const char *m), (p, m), AT_FDCWD, p)
ON_NAME(OPEN, DIR *, NULL, opendir, (const char *p), (p), AT_FDCWD, p)
ON_NAME(OPEN, int, -1, creat, (const char *p, mode_t m), (p, m), AT_FDCWD, p)
ON_NAME(OPEN, int, -1, creat64, (const char *p, mode_t m), (p, m), AT_FDCWD, p)
ON_NAME(OPEN, int, -1, __open_2, (const char *p, int x), (p, x), AT_FDCWD, p)
ON_NAME(OPEN, int, -1, __open64_2, (const char *p, int x), (p, x), AT_FDCWD, p)
ON_NAME(OPEN, int, -1, __openat_2, (int d, const char *p, int x), (d, p, x), d, p)
ON_NAME(OPEN, int, -1, __openat64_2, (int d, const char *p, int x), (d, p, x), d, p)

static mode_t mode_of(int flags, va_list list) {
  return flags & (O_CREAT | __O_TMPFILE) ? va_arg(list, mode_t) : 0;
}

#define OPENS(function) \
  int function(const char *path, int flags, ...) { \
    REAL(int, #function, const char *, int, ...); \
    va_list list; \
    va_start(list, flags); \
    mode_t mode = mode_of(flags, list); \
    va_end(list); \
    return fails_at(OPEN, AT_FDCWD, path) ? -1 : real(path, flags, mode); \
  }
OPENS(open)
OPENS(open64)

#define OPENS_AT(function) \
  int function(int folder, const char *path, int flags, ...) { \
    REAL(int, #function, int, const char *, int, ...); \
    va_list list; \
    va_start(list, flags); \
    mode_t mode = mode_of(flags, list); \
    va_end(list); \
    return fails_at(OPEN, folder, path) ? -1 : real(folder, path, flags, mode); \
  }
OPENS_AT(openat)
OPENS_AT(openat64)

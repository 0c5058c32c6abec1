/* A disk that is full after a number of writes, for the process that has this library preloaded.

   From the write of that number on, every write into one folder fails with ENOSPC, as do new files and new folders.
   The first write that fails has written half of its bytes. Or the process is killed there. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long allowed = -1, count = 0;
static int killing = 0;

void full_disk_set(const char *path, long writes, int kill) {
    strncpy(folder, path, sizeof folder - 1);
    allowed = writes, killing = kill, count = 0;
}

long full_disk_count(void) { return count; }

/* Whether this write must fail. */
static int fails(void) {
    if (allowed >= 0 && count >= allowed) {
        if (killing) kill(getpid(), SIGKILL);
        errno = ENOSPC;
        return 1;
    }
    count++;
    return 0;
}

static int is_inside(const char *path) {
    size_t length = strlen(folder);
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int is_inside_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!folder[0] || fd < 3) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_inside(path);
}

static int is_new(const char *path) {
    struct stat found;
    return is_inside(path) && stat(path, &found) != 0;
}

#define NEXT(name) static __typeof__(&name) next; if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *bytes, size_t size) {
    NEXT(write);
    if (is_inside_fd(fd)) {
        int first = count == allowed && size > 1 && !killing;
        if (first) { count++; return next(fd, bytes, size / 2); }
        if (fails()) return -1;
    }
    return next(fd, bytes, size);
}

ssize_t pwrite(int fd, const void *bytes, size_t size, off_t at) {
    NEXT(pwrite);
    if (is_inside_fd(fd) && fails()) return -1;
    return next(fd, bytes, size, at);
}

ssize_t pwrite64(int fd, const void *bytes, size_t size, off64_t at) {
    NEXT(pwrite64);
    if (is_inside_fd(fd) && fails()) return -1;
    return next(fd, bytes, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int number) {
    NEXT(writev);
    if (is_inside_fd(fd) && fails()) return -1;
    return next(fd, parts, number);
}

int fsync(int fd) {
    NEXT(fsync);
    if (is_inside_fd(fd) && fails()) return -1;
    return next(fd);
}

int mkdir(const char *path, mode_t mode) {
    NEXT(mkdir);
    if (is_inside(path) && fails()) return -1;
    return next(path, mode);
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        NEXT(name); \
        va_list rest; va_start(rest, flags); \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (flags & O_CREAT && is_new(path) && fails()) return -1; \
        return next(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        NEXT(name); \
        va_list rest; va_start(rest, flags); \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (flags & O_CREAT && is_new(path) && fails()) return -1; \
        return next(at, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        NEXT(name); \
        if (mode[0] != 'r' && is_new(path) && fails()) return NULL; \
        return next(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

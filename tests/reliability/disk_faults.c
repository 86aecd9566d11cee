/* Preloaded: lets the n-th call that changes a file beneath one folder fail, or be the last that its process makes.

A write that is to fail writes half of its bytes; the next one fails. Writes within libc's own stdio are not seen. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CREATE = 1, WRITE = 2, SYNC = 4, RENAME = 8, REMOVE = 16 };

static char folder[PATH_MAX];
static long counted, at = -1;
static int kinds, code, lasting;

/* From now on: the call `call` (from 1) of those in `which` fails with `number`, 0 to kill; all later ones too where `forever`. */
void disk_faults_arm(const char *beneath, long call, int which, int number, int forever) {
    snprintf(folder, sizeof folder, "%s", beneath);
    counted = 0, at = call, kinds = which, code = number, lasting = forever;
}

long disk_faults_counted(void) { return counted; }

static int beneath(const char *path) {
    size_t length = strlen(folder);
    return length && path && !strncmp(path, folder, length) && (!path[length] || path[length] == '/');
}

static int fd_beneath(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = folder[0] ? readlink(link, path, sizeof path - 1) : -1;
    if (length < 0) return 0;
    path[length] = 0;
    return beneath(path);
}

static int due(int kind, int ours) {
    if (!ours || !(kinds & kind)) return 0;
    long now = __atomic_add_fetch(&counted, 1, __ATOMIC_SEQ_CST);
    return at > 0 && (now == at || (lasting && now > at));
}

static int refused(int kind, int ours) {
    if (!due(kind, ours)) return 0;
    if (!code) kill(getpid(), SIGKILL);
    errno = code;
    return 1;
}

#define REAL(name, ...) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))(__VA_ARGS__)
#define MAKES(flags) ((flags) & (O_CREAT | O_TRUNC))
#define OPENING(name, ours, ...)                                        \
    mode_t mode = 0;                                                    \
    if (flags & (O_CREAT | O_TMPFILE)) {                                \
        va_list more;                                                   \
        va_start(more, flags), mode = va_arg(more, mode_t), va_end(more); \
    }                                                                   \
    return MAKES(flags) && refused(CREATE, ours) ? -1 : REAL(name, __VA_ARGS__, flags, mode)

int open(const char *path, int flags, ...) { OPENING(open, beneath(path), path); }
int open64(const char *path, int flags, ...) { OPENING(open64, beneath(path), path); }
int openat(int at, const char *path, int flags, ...) { OPENING(openat, beneath(path) || fd_beneath(at), at, path); }
int openat64(int at, const char *path, int flags, ...) { OPENING(openat64, beneath(path) || fd_beneath(at), at, path); }
FILE *fopen(const char *path, const char *how) { return *how != 'r' && refused(CREATE, beneath(path)) ? NULL : REAL(fopen, path, how); }
FILE *fopen64(const char *path, const char *how) { return *how != 'r' && refused(CREATE, beneath(path)) ? NULL : REAL(fopen64, path, how); }
int mkdir(const char *path, mode_t mode) { return refused(CREATE, beneath(path)) ? -1 : REAL(mkdir, path, mode); }

ssize_t write(int fd, const void *bytes, size_t size) {
    static int half_done;
    int ours = fd_beneath(fd);
    if (ours && half_done) {
        half_done = lasting, errno = code;
        return -1;
    }
    if (due(WRITE, ours)) {
        ssize_t written = size > 1 ? REAL(write, fd, bytes, size / 2) : 0;
        if (!code) kill(getpid(), SIGKILL);
        if (written > 0) half_done = 1; else errno = code;
        return written > 0 ? written : -1;
    }
    return REAL(write, fd, bytes, size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) { return refused(WRITE, fd_beneath(fd)) ? -1 : REAL(writev, fd, parts, count); }
ssize_t pwrite64(int fd, const void *bytes, size_t size, off64_t place) {
    return refused(WRITE, fd_beneath(fd)) ? -1 : REAL(pwrite64, fd, bytes, size, place);
}
ssize_t copy_file_range(int from, off64_t *start, int to, off64_t *end, size_t size, unsigned flags) {
    return refused(WRITE, fd_beneath(to)) ? -1 : REAL(copy_file_range, from, start, to, end, size, flags);
}
int ftruncate64(int fd, off64_t size) { return refused(WRITE, fd_beneath(fd)) ? -1 : REAL(ftruncate64, fd, size); }

int fsync(int fd) { return refused(SYNC, fd_beneath(fd)) ? -1 : REAL(fsync, fd); }
int fdatasync(int fd) { return refused(SYNC, fd_beneath(fd)) ? -1 : REAL(fdatasync, fd); }
int rename(const char *from, const char *to) { return refused(RENAME, beneath(to)) ? -1 : REAL(rename, from, to); }
int renameat(int a, const char *from, int b, const char *to) {
    return refused(RENAME, beneath(to)) ? -1 : REAL(renameat, a, from, b, to);
}
int unlink(const char *path) { return refused(REMOVE, beneath(path)) ? -1 : REAL(unlink, path); }
int unlinkat(int at, const char *path, int flags) {
    return refused(REMOVE, beneath(path) || fd_beneath(at)) ? -1 : REAL(unlinkat, at, path, flags);
}
int rmdir(const char *path) { return refused(REMOVE, beneath(path)) ? -1 : REAL(rmdir, path); }

/* A library for LD_PRELOAD in which the n-th system call of a kind below one folder fails. Built and used by errnos.py.
 *
 * It overrides functions of libc, so it also affects SQLite's calls. Nothing happens before tc_errno_arm(). A call counts
 * if its path, or the file of its descriptor, is below the folder. The path of a descriptor is read from /proc/self/fd,
 * which also knows duplicated and inherited descriptors, and deleted files.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* The order is that of KINDS in errnos.py. */
enum kind {
    OPEN, OPENDIR, READ, PREAD, WRITE, PWRITE, TRUNCATE, LINK, UNLINK, RENAME, MKDIR, CHMOD, CHOWN, STAT, ACCESS, FLOCK,
    LOCK, SYNC, MMAP, STATVFS, FALLOCATE, UTIME, N_KINDS
};

static char folder[PATH_MAX];
static size_t folder_length;
static atomic_int armed;
static int armed_kind, armed_errno;
static long armed_from, armed_until;
static atomic_long counts[N_KINDS];
static atomic_long n_struck;
static char where[PATH_MAX + 64];

void tc_errno_arm(const char *below, int kind, long nth, long times, int error)
{
    atomic_store(&armed, 0);
    snprintf(folder, sizeof folder, "%s", below);
    folder_length = strlen(folder);
    armed_kind = kind;
    armed_errno = error;
    armed_from = nth;
    armed_until = times < 0 ? LONG_MAX : nth + times;
    for (int i = 0; i < N_KINDS; i++)
        atomic_store(&counts[i], 0);
    atomic_store(&n_struck, 0);
    where[0] = 0;
    atomic_store(&armed, 1);
}

void tc_errno_disarm(void) { atomic_store(&armed, 0); }
long tc_errno_count(int kind) { return atomic_load(&counts[kind]); }
long tc_errno_struck(void) { return atomic_load(&n_struck); }
const char *tc_errno_where(void) { return where; }

static int below(const char *path)
{
    return !strncmp(path, folder, folder_length) && (path[folder_length] == '/' || path[folder_length] == 0 ||
                                                     path[folder_length] == ' '); /* " (deleted)" */
}

static int path_of(int fd, char *path, size_t size)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, size - 1);
    path[n < 0 ? 0 : n] = 0;
    return n >= 0;
}

/* Returns whether this call fails, and sets errno if it does. */
static int due(enum kind kind, const char *function, const char *path)
{
    long n = atomic_fetch_add(&counts[kind], 1) + 1;
    if ((int)kind != armed_kind || n < armed_from || n >= armed_until)
        return 0;
    if (!atomic_fetch_add(&n_struck, 1))
        snprintf(where, sizeof where, "%s(%s)", function, path);
    errno = armed_errno;
    return 1;
}

static int fails_at(enum kind kind, const char *function, int dir_fd, const char *path)
{
    char base[PATH_MAX];
    if (!atomic_load(&armed) || !path)
        return 0;
    if (path[0] == '/')
        return below(path) && due(kind, function, path);
    return dir_fd != AT_FDCWD && path_of(dir_fd, base, sizeof base) && below(base) && due(kind, function, path);
}

static int fails_fd(enum kind kind, const char *function, int fd)
{
    char path[PATH_MAX];
    if (!atomic_load(&armed) || fd < 0)
        return 0;
    int saved = errno, ours = path_of(fd, path, sizeof path) && below(path);
    errno = saved;
    return ours && due(kind, function, path);
}

#define REAL(name)                                                                                                     \
    static __typeof__(&name) real;                                                                                     \
    if (!real)                                                                                                         \
        real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* Overrides of functions whose file is given by a descriptor, by a path, or by a descriptor and a path. */
#define BY_FD(kind, type, name, parameters, fd, arguments)                                                             \
    type name parameters                                                                                               \
    {                                                                                                                  \
        REAL(name);                                                                                                    \
        return fails_fd(kind, #name, fd) ? (type)-1 : real arguments;                                                  \
    }
#define BY_PATH(kind, type, name, parameters, path, arguments)                                                         \
    type name parameters                                                                                               \
    {                                                                                                                  \
        REAL(name);                                                                                                    \
        return fails_at(kind, #name, AT_FDCWD, path) ? (type)-1 : real arguments;                                      \
    }
#define BY_AT(kind, type, name, parameters, fd, path, arguments)                                                       \
    type name parameters                                                                                               \
    {                                                                                                                  \
        REAL(name);                                                                                                    \
        return fails_at(kind, #name, fd, path) ? (type)-1 : real arguments;                                            \
    }

static mode_t mode_of(int flags, va_list list)
{
    return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(list, mode_t) : 0;
}

#define OPEN_PATH(name)                                                                                                \
    int name(const char *path, int flags, ...)                                                                         \
    {                                                                                                                  \
        REAL(name);                                                                                                    \
        va_list list;                                                                                                  \
        va_start(list, flags);                                                                                         \
        mode_t mode = mode_of(flags, list);                                                                            \
        va_end(list);                                                                                                  \
        return fails_at(OPEN, #name, AT_FDCWD, path) ? -1 : real(path, flags, mode);                                   \
    }
#define OPEN_AT(name)                                                                                                  \
    int name(int fd, const char *path, int flags, ...)                                                                 \
    {                                                                                                                  \
        REAL(name);                                                                                                    \
        va_list list;                                                                                                  \
        va_start(list, flags);                                                                                         \
        mode_t mode = mode_of(flags, list);                                                                            \
        va_end(list);                                                                                                  \
        return fails_at(OPEN, #name, fd, path) ? -1 : real(fd, path, flags, mode);                                     \
    }
OPEN_PATH(open)
OPEN_PATH(open64)
OPEN_AT(openat)
OPEN_AT(openat64)

DIR *opendir(const char *path)
{
    REAL(opendir);
    return fails_at(OPENDIR, "opendir", AT_FDCWD, path) ? NULL : real(path);
}

DIR *fdopendir(int fd)
{
    REAL(fdopendir);
    return fails_fd(OPENDIR, "fdopendir", fd) ? NULL : real(fd);
}

BY_FD(READ, ssize_t, read, (int fd, void *to, size_t n), fd, (fd, to, n))
BY_FD(READ, ssize_t, readv, (int fd, const struct iovec *to, int n), fd, (fd, to, n))
BY_FD(PREAD, ssize_t, pread, (int fd, void *to, size_t n, off_t at), fd, (fd, to, n, at))
BY_FD(PREAD, ssize_t, pread64, (int fd, void *to, size_t n, off64_t at), fd, (fd, to, n, at))
BY_FD(PREAD, ssize_t, preadv, (int fd, const struct iovec *to, int n, off_t at), fd, (fd, to, n, at))
BY_FD(PREAD, ssize_t, preadv64, (int fd, const struct iovec *to, int n, off64_t at), fd, (fd, to, n, at))
BY_FD(PREAD, ssize_t, preadv2, (int fd, const struct iovec *to, int n, off_t at, int how), fd, (fd, to, n, at, how))
BY_FD(PREAD, ssize_t, preadv64v2, (int fd, const struct iovec *to, int n, off64_t at, int how), fd, (fd, to, n, at, how))
BY_FD(WRITE, ssize_t, write, (int fd, const void *from, size_t n), fd, (fd, from, n))
BY_FD(WRITE, ssize_t, writev, (int fd, const struct iovec *from, int n), fd, (fd, from, n))
BY_FD(PWRITE, ssize_t, pwrite, (int fd, const void *from, size_t n, off_t at), fd, (fd, from, n, at))
BY_FD(PWRITE, ssize_t, pwrite64, (int fd, const void *from, size_t n, off64_t at), fd, (fd, from, n, at))
BY_FD(PWRITE, ssize_t, pwritev, (int fd, const struct iovec *from, int n, off_t at), fd, (fd, from, n, at))
BY_FD(PWRITE, ssize_t, pwritev64, (int fd, const struct iovec *from, int n, off64_t at), fd, (fd, from, n, at))
BY_FD(PWRITE, ssize_t, pwritev2, (int fd, const struct iovec *from, int n, off_t at, int how), fd, (fd, from, n, at, how))
BY_FD(PWRITE, ssize_t, pwritev64v2, (int fd, const struct iovec *from, int n, off64_t at, int how), fd,
      (fd, from, n, at, how))
BY_FD(TRUNCATE, int, ftruncate, (int fd, off_t n), fd, (fd, n))
BY_FD(TRUNCATE, int, ftruncate64, (int fd, off64_t n), fd, (fd, n))
BY_PATH(TRUNCATE, int, truncate, (const char *path, off_t n), path, (path, n))
BY_PATH(TRUNCATE, int, truncate64, (const char *path, off64_t n), path, (path, n))
BY_PATH(LINK, int, link, (const char *from, const char *to), to, (from, to))
BY_AT(LINK, int, linkat, (int from_fd, const char *from, int to_fd, const char *to, int how), to_fd, to,
      (from_fd, from, to_fd, to, how))
BY_PATH(UNLINK, int, unlink, (const char *path), path, (path))
BY_AT(UNLINK, int, unlinkat, (int fd, const char *path, int how), fd, path, (fd, path, how))
BY_PATH(UNLINK, int, rmdir, (const char *path), path, (path))
BY_PATH(RENAME, int, rename, (const char *from, const char *to), to, (from, to))
BY_AT(RENAME, int, renameat, (int from_fd, const char *from, int to_fd, const char *to), to_fd, to,
      (from_fd, from, to_fd, to))
BY_AT(RENAME, int, renameat2, (int from_fd, const char *from, int to_fd, const char *to, unsigned how), to_fd, to,
      (from_fd, from, to_fd, to, how))
BY_PATH(MKDIR, int, mkdir, (const char *path, mode_t mode), path, (path, mode))
BY_AT(MKDIR, int, mkdirat, (int fd, const char *path, mode_t mode), fd, path, (fd, path, mode))
BY_FD(CHMOD, int, fchmod, (int fd, mode_t mode), fd, (fd, mode))
BY_PATH(CHMOD, int, chmod, (const char *path, mode_t mode), path, (path, mode))
BY_AT(CHMOD, int, fchmodat, (int fd, const char *path, mode_t mode, int how), fd, path, (fd, path, mode, how))
BY_FD(CHOWN, int, fchown, (int fd, uid_t user, gid_t group), fd, (fd, user, group))
BY_FD(STAT, int, fstat, (int fd, struct stat *to), fd, (fd, to))
BY_FD(STAT, int, fstat64, (int fd, struct stat64 *to), fd, (fd, to))
BY_PATH(STAT, int, stat, (const char *path, struct stat *to), path, (path, to))
BY_PATH(STAT, int, stat64, (const char *path, struct stat64 *to), path, (path, to))
BY_PATH(STAT, int, lstat, (const char *path, struct stat *to), path, (path, to))
BY_PATH(STAT, int, lstat64, (const char *path, struct stat64 *to), path, (path, to))
BY_AT(STAT, int, fstatat, (int fd, const char *path, struct stat *to, int how), fd, path, (fd, path, to, how))
BY_AT(STAT, int, fstatat64, (int fd, const char *path, struct stat64 *to, int how), fd, path, (fd, path, to, how))
BY_PATH(ACCESS, int, access, (const char *path, int how), path, (path, how))
BY_AT(ACCESS, int, faccessat, (int fd, const char *path, int how, int flags), fd, path, (fd, path, how, flags))

int flock(int fd, int how)
{
    REAL(flock);
    return !(how & LOCK_UN) && fails_fd(FLOCK, "flock", fd) ? -1 : real(fd, how);
}
BY_FD(SYNC, int, fsync, (int fd), fd, (fd))
BY_FD(SYNC, int, fdatasync, (int fd), fd, (fd))
BY_PATH(STATVFS, int, statvfs, (const char *path, struct statvfs *to), path, (path, to))
BY_PATH(STATVFS, int, statvfs64, (const char *path, struct statvfs64 *to), path, (path, to))
BY_FD(STATVFS, int, fstatvfs, (int fd, struct statvfs *to), fd, (fd, to))
BY_FD(STATVFS, int, fstatvfs64, (int fd, struct statvfs64 *to), fd, (fd, to))
BY_FD(FALLOCATE, int, fallocate, (int fd, int how, off_t at, off_t n), fd, (fd, how, at, n))
BY_FD(FALLOCATE, int, fallocate64, (int fd, int how, off64_t at, off64_t n), fd, (fd, how, at, n))
BY_AT(UTIME, int, utimensat, (int fd, const char *path, const struct timespec times[2], int how), fd, path,
      (fd, path, times, how))
BY_FD(UTIME, int, futimens, (int fd, const struct timespec times[2]), fd, (fd, times))

/* These functions return the errno instead of setting it. */
#define POSIX_FALLOCATE(name, type)                                                                                    \
    int name(int fd, type at, type n)                                                                                  \
    {                                                                                                                  \
        REAL(name);                                                                                                    \
        return fails_fd(FALLOCATE, #name, fd) ? errno : real(fd, at, n);                                               \
    }
POSIX_FALLOCATE(posix_fallocate, off_t)
POSIX_FALLOCATE(posix_fallocate64, off64_t)

#define MMAP_FILE(name, type)                                                                                          \
    void *name(void *at, size_t n, int protection, int how, int fd, type offset)                                       \
    {                                                                                                                  \
        REAL(name);                                                                                                    \
        return !(how & MAP_ANONYMOUS) && fails_fd(MMAP, #name, fd) ? MAP_FAILED                                        \
                                                                   : real(at, n, protection, how, fd, offset);         \
    }
MMAP_FILE(mmap, off_t)
MMAP_FILE(mmap64, off64_t)

/* Releasing a lock never fails on a file system that supports locks, so only acquiring one can fail here. */
static int takes_lock(int command, const struct flock *lock)
{
    int sets = command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW;
    return sets && lock->l_type != F_UNLCK;
}

#define FCNTL(name)                                                                                                    \
    int name(int fd, int command, ...)                                                                                 \
    {                                                                                                                  \
        REAL(name);                                                                                                    \
        va_list list;                                                                                                  \
        va_start(list, command);                                                                                       \
        void *argument = va_arg(list, void *);                                                                         \
        va_end(list);                                                                                                  \
        return takes_lock(command, argument) && fails_fd(LOCK, #name, fd) ? -1 : real(fd, command, argument);          \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

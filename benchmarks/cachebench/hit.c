/* The baseline of a cache hit: the time that the kernel takes to open, lock, stat, map, unmap and close files, one by
 * one. */
#include <fcntl.h>
#include <stddef.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* paths: n paths; each file is opened once. Returns the number of mapped files; -1 if one could not be opened or
 * mapped. */
long hits(const char *const *paths, size_t n) {
    long mapped = 0;
    for (size_t i = 0; i < n; i++) {
        int fd = open(paths[i], O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
        struct stat found;
        if (fd < 0) return -1;
        if (flock(fd, LOCK_SH | LOCK_NB) || fstat(fd, &found) || !found.st_nlink) {
            close(fd);
            return -1;
        }
        void *memory = mmap(NULL, (size_t)found.st_size, PROT_READ, MAP_SHARED, fd, 0);
        if (memory == MAP_FAILED) {
            close(fd);
            return -1;
        }
        mapped++;
        munmap(memory, (size_t)found.st_size);
        close(fd);
    }
    return mapped;
}

/* The file system as a program sees it, with one fault: loaded before libc (LD_PRELOAD), it counts each call that a
 * process makes about files below one folder, and at the chosen one sends itself a signal, or answers with an error.
 *
 * frlkit_fault(folder, log, kind, at, value) arms it in this process: kind 0 only counts, 1 sends the signal `value`
 * before call number `at` (counted from 0), 2 answers that call with errno `value`, 3 lets half of it be written if it
 * is a write, and then sends the signal, 4 answers it and all that follow with errno `value`. An empty folder disarms
 * it. Every call is a line of `log`: its name, a space, and the path within the folder.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#undef open64
#undef openat64
#undef stat64
#undef lstat64

enum { COUNT, SIGNAL, ANSWER, HALF, ALWAYS };
static char folder[4096], names[1024][4096]; /* the open files' paths within the folder; empty: not in it */
static int log_file = -1, kind, value;
static long at, count;

void frlkit_fault(const char *where, const char *log, int what, long when, int how) {
  snprintf(folder, sizeof folder, "%s", where);
  if (log_file >= 0) syscall(SYS_close, log_file);
  log_file = *log ? syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
  kind = what, at = when, value = how, count = 0;
}

/* The part of a path that lies within the folder, or null. */
static const char *within(const char *path) {
  size_t length = strlen(folder);
  if (!length || !path || strncmp(path, folder, length)) return NULL;
  return path[length] == '/' ? path + length + 1 : path[length] ? NULL : ".";
}

static const char *name_of(int file) {
  return *folder && file >= 0 && file < 1024 && *names[file] ? names[file] : NULL;
}

/* Whether this call fails, with errno set; or the process ends here. `file` and what it writes, for half a write. */
static int fails(const char *call, const char *name, int file, const void *content, size_t size) {
  if (!name) return 0;
  long number = count++;
  char line[8300];
  int length = snprintf(line, sizeof line, "%s %s\n", call, name);
  if (log_file >= 0) syscall(SYS_write, log_file, line, length);
  if (kind == COUNT || (kind == ALWAYS ? number < at : number != at)) return 0;
  if (kind == ANSWER || kind == ALWAYS) {
    errno = value;
    return 1;
  }
  if (kind == HALF && content) syscall(SYS_write, file, content, size / 2);
  syscall(SYS_kill, getpid(), value);
  return 0;
}

static int opened(int file, const char *path) {
  if (file >= 0 && file < 1024) snprintf(names[file], sizeof names[file], "%s", within(path) ? within(path) : "");
  return file;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define MODE                      \
  va_list words;                  \
  va_start(words, flags);         \
  mode_t mode = va_arg(words, int); \
  va_end(words);

static int open_one(const char *path, int flags, mode_t mode) {
  const char *call = flags & O_DIRECTORY ? "list" : flags & O_CREAT ? "create" : "open";
  if (fails(call, within(path), 0, NULL, 0)) return -1;
  return opened(syscall(SYS_openat, AT_FDCWD, path, flags, mode), path);
}
int open(const char *path, int flags, ...) { MODE return open_one(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return open_one(path, flags, mode); }
int openat(int place, const char *path, int flags, ...) {
  MODE if (place == AT_FDCWD || *path == '/') return open_one(path, flags, mode);
  return opened(syscall(SYS_openat, place, path, flags, mode), "");
}
int openat64(int place, const char *path, int flags, ...) { MODE return openat(place, path, flags, mode); }

int close(int file) {
  int failed = fails("close", name_of(file), 0, NULL, 0), error = errno;
  if (file >= 0 && file < 1024) *names[file] = 0;
  int result = syscall(SYS_close, file); /* closed all the same, as Linux does */
  return failed ? (errno = error, -1) : result;
}
ssize_t write(int file, const void *content, size_t size) {
  return fails("write", name_of(file), file, content, size) ? -1 : syscall(SYS_write, file, content, size);
}
ssize_t read(int file, void *content, size_t size) {
  return fails("read", name_of(file), 0, NULL, 0) ? -1 : syscall(SYS_read, file, content, size);
}
int fsync(int file) { return fails("fsync", name_of(file), 0, NULL, 0) ? -1 : (int)syscall(SYS_fsync, file); }
int flock(int file, int how) {
  const char *call = how & LOCK_UN ? "unlock" : "lock";
  return fails(call, name_of(file), 0, NULL, 0) ? -1 : (int)syscall(SYS_flock, file, how);
}
int rename(const char *from, const char *to) {
  return fails("rename", within(to), 0, NULL, 0) ? -1 : (int)syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to);
}
int unlink(const char *path) {
  return fails("remove", within(path), 0, NULL, 0) ? -1 : (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}
int rmdir(const char *path) {
  return fails("rmdir", within(path), 0, NULL, 0) ? -1 : (int)syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR);
}
int mkdir(const char *path, mode_t mode) {
  return fails("mkdir", within(path), 0, NULL, 0) ? -1 : (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
}
int chmod(const char *path, mode_t mode) {
  return fails("chmod", within(path), 0, NULL, 0) ? -1 : (int)syscall(SYS_fchmodat, AT_FDCWD, path, mode);
}
DIR *opendir(const char *path) { return fails("list", within(path), 0, NULL, 0) ? NULL : REAL(opendir)(path); }

/* Both names of stat: glibc before 2.33 has the first, and what is compiled against a newer one calls the second. */
#define STAT(name, real, before, after, path)                               \
  int name(before const char *path, void *status after);                    \
  int name(before const char *path, void *status after) {                   \
    return fails("stat", within(path), 0, NULL, 0) ? -1 : real;             \
  }
typedef int (*Old)(int, const char *, void *);
typedef int (*New)(const char *, void *);
#define OLD(name) int name(int version, const char *path, void *status) { \
  return fails("stat", within(path), 0, NULL, 0) ? -1 : ((Old)dlsym(RTLD_NEXT, #name))(version, path, status); }
#define NEW(name) int name(const char *path, struct stat *status) { \
  return fails("stat", within(path), 0, NULL, 0) ? -1 : ((New)dlsym(RTLD_NEXT, #name))(path, status); }
#define NEW64(name) int name(const char *path, struct stat64 *status) { \
  return fails("stat", within(path), 0, NULL, 0) ? -1 : ((New)dlsym(RTLD_NEXT, #name))(path, status); }
OLD(__xstat)
OLD(__xstat64)
OLD(__lxstat)
OLD(__lxstat64)
NEW(stat)
NEW(lstat)
NEW64(stat64)
NEW64(lstat64)

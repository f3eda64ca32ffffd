#include "segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "../common/check.h"

namespace odysseus {
namespace {

std::size_t file_bytes(const GroupShape& shape) {
  return header_bytes(shape.world, page_size()) + shape.window_bytes * kWindows;
}

// A lock on the first byte, held for life.  POSIX locks (not those of open file descriptions) because the kernel drops
// them when the process dies, zombies included, and a forked child does not inherit them.
struct flock life_lock() {
  struct flock lock{};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = 0;
  lock.l_len = 1;
  return lock;
}

std::shared_ptr<Mapping> map(int fd, std::size_t bytes) {
  void* address = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (address == MAP_FAILED) throw_errno(errno, concat("mapping a segment of ", bytes, " bytes (check ulimit -v)"));
  // A core dump would walk terabytes of address space that hold next to nothing.  Only advice: no harm if refused.
  ::madvise(address, bytes, MADV_DONTDUMP);
  return std::make_shared<Mapping>(address, bytes);
}

template <class Value>
void verify(const char* field, Value expected, Value found, int rank, const std::string& path) {
  if (expected == found) return;
  throw std::runtime_error(concat("segment of rank ", rank, " at ", path, ": expected ", field, " ", expected,
                                  ", found ", found,
                                  "; all ranks of a group need one host, one process-id namespace, the same "
                                  "build and the same arguments"));
}

}  // namespace

std::size_t page_size() {
  static const std::size_t bytes = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

bool allocate(int fd, std::size_t offset, std::size_t bytes, const std::string& what) {
  if (::fallocate(fd, 0, static_cast<off_t>(offset), static_cast<off_t>(bytes)) == 0) return true;
  const int error = errno;
  if (error == EINTR) return false;
  if (error != ENOSPC && error != ENOMEM && error != EDQUOT && error != EFBIG)
    throw_errno(error, "fallocate for " + what);
  struct statvfs stats{};
  const std::uint64_t free =
      ::fstatvfs(fd, &stats) == 0 ? static_cast<std::uint64_t>(stats.f_bavail) * stats.f_frsize : 0;
  throw NoSpaceError(concat(what, " needs ", bytes, " more bytes of shared memory, ", free,
                            " are free; enlarge the file system (containers: --shm-size) or use smaller buffers"),
                     bytes, free);
}

Segment::Segment(UniqueFd fd, const GroupShape& shape)
    : fd_(std::move(fd)),
      mapping_(map(fd_.get(), file_bytes(shape))),
      world_(shape.world),
      window_bytes_(shape.window_bytes),
      header_bytes_(header_bytes(shape.world, page_size())) {}

Segment Segment::create(const std::string& directory, int rank, const GroupShape& shape) {
  UniqueFd fd(::open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  if (!fd) {
    throw_errno(errno, concat("making a nameless segment in ", directory,
                              " (expected a writable tmpfs directory; ODYSSEUS_SHM_DIR names another)"));
  }
  if (::ftruncate(fd.get(), static_cast<off_t>(file_bytes(shape))) != 0) {
    throw_errno(errno, concat("sizing a segment in ", directory, " to ", file_bytes(shape), " bytes"));
  }
  while (!allocate(fd.get(), 0, header_bytes(shape.world, page_size()),
                   concat("the header of a segment in ", directory))) {
  }
  struct flock lock = life_lock();
  if (::fcntl(fd.get(), F_SETLK, &lock) != 0) throw_errno(errno, concat("locking a segment in ", directory));

  Segment segment(std::move(fd), shape);
  Header& header = segment.header();  // a new file reads as zeros, which is what every word starts from
  header.magic = kMagic;
  header.version = kLayoutVersion;
  header.world = static_cast<std::uint64_t>(shape.world);
  header.rank = static_cast<std::uint64_t>(rank);
  header.nonce = shape.nonce;
  header.window_bytes = shape.window_bytes;
  header.status.value.store(static_cast<std::uint64_t>(Status::kOpen), std::memory_order_seq_cst);
  return segment;
}

Segment Segment::open(const std::string& path, int rank, const GroupShape& shape) {
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (!fd) {
    throw std::runtime_error(concat("segment of rank ", rank, ": cannot open ", path, " (", std::strerror(errno),
                                    "); expected a live process of the same user, host and process-id namespace"));
  }
  struct stat info{};
  if (::fstat(fd.get(), &info) != 0) throw_errno(errno, concat("reading the size of ", path));
  // Before it is mapped: bytes beyond the end of a file would answer with SIGBUS.
  verify<std::uint64_t>("size in bytes", file_bytes(shape), static_cast<std::uint64_t>(info.st_size), rank, path);

  Segment segment(std::move(fd), shape);
  const Header& header = segment.header();
  verify<std::uint64_t>("magic", kMagic, header.magic, rank, path);
  verify<std::uint64_t>("layout version", kLayoutVersion, header.version, rank, path);
  verify<std::uint64_t>("world", static_cast<std::uint64_t>(shape.world), header.world, rank, path);
  verify<std::uint64_t>("rank", static_cast<std::uint64_t>(rank), header.rank, rank, path);
  verify<std::uint64_t>("nonce", shape.nonce, header.nonce, rank, path);
  verify<std::uint64_t>("window bytes", shape.window_bytes, header.window_bytes, rank, path);
  return segment;
}

bool Segment::locked() const {
  struct flock lock = life_lock();
  if (::fcntl(fd_.get(), F_GETLK, &lock) != 0) throw_errno(errno, "testing whether a peer is alive");
  return lock.l_type != F_UNLCK;
}

}  // namespace odysseus

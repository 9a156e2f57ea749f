//! The memory of this process.

use std::fs;
use std::hint::black_box;
use std::path::Path;

/// Free memory that the allocator keeps, in bytes.
const KEPT: usize = if usize::BITS < 64 { 1000 << 10 } else { 2 << 20 };
/// The largest block, with its header, that changes how much glibc keeps, in bytes. A larger one has no effect.
const LARGEST_BLOCK: usize = if usize::BITS < 64 { 512 << 10 } else { 32 << 20 };
const _: () = assert!(KEPT / 2 + (4 << 10) <= LARGEST_BLOCK);

/// Lets the allocator keep some free memory. Otherwise each scrape takes memory from the system and gives it back, several times.
///
/// Source: mallopt(3), `M_MMAP_THRESHOLD`. Once glibc has freed a block that it had mapped, it keeps free memory of up to twice
/// the size of that block.
pub fn keep_some() {
    drop(black_box(Vec::<u8>::with_capacity(KEPT / 2)));
}

/// A bound of something that is read whole, in bytes: this part of the memory limit, within `least` and `most`.
pub fn bound(part: u64, least: u64, most: u64) -> u64 {
    limit().map_or(most, |limit| (limit / part).clamp(least, most))
}

/// The limit of the process's cgroup and of those above it, in bytes. None if there is no limit, or no cgroup can be read.
///
/// Source: cgroups(7). Version 2 has `memory.max`, which holds `max` without a limit; version 1 has `memory.limit_in_bytes`,
/// which then holds a number beyond any memory.
pub fn limit() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = groups.lines().flat_map(|group| {
        let mut fields = group.splitn(3, ':').skip(1);
        let (top, file) = match fields.next() {
            Some("") => ("/sys/fs/cgroup", "memory.max"),
            Some("memory") => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => return Vec::new(),
        };
        // The path may be that of the host. Then only the directory at the top exists, which is the container's own.
        let path = Path::new(fields.next().unwrap_or_default().trim_start_matches('/'));
        let files = path.ancestors().map(|path| Path::new(top).join(path).join(file));
        files.filter_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok()).collect()
    });
    limits.min()
}

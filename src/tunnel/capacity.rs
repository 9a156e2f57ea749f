//! How much the tunnel takes on, by the limits for open files and for memory, and the failure of what is too much.

use rustix::process::{Resource, getrlimit, setrlimit};

use crate::memory;
use crate::net::{ScrapeError, ScrapeReason};

/// The most tunnels at once, where no limit sets a lower number.
const MAX_TUNNELS: usize = 30_000;
/// File descriptors that a tunnel may take: its own and that of its scrape, or the two ends of a relay and the next scrape.
const FILES_PER_TUNNEL: usize = 3;
/// File descriptors for everything else, the spare connections among them.
const OTHER_FILES: usize = 64;
/// Memory without any tunnel, in bytes: the program, its allocator, and the target file.
const BASE_MEMORY: usize = 16 << 20;
/// Memory of a tunnel that idles, in bytes. Measured: 17 KB.
const TUNNEL_MEMORY: usize = 20 << 10;
/// Memory of a scrape, in bytes: two connections of Prometheus, and the buffers of both sides while an answer passes.
const SCRAPE_MEMORY: usize = 224 << 10;

/// How much the tunnel takes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// Idle or in use.
    pub tunnels: usize,
    pub scrapes: usize,
    pub connections: usize,
}

/// Connections beyond the number of scrapes, so that overload is answered with 503 and health checks are answered too.
const SPARE_CONNECTIONS: usize = 16;

impl Places {
    /// The places within the limits of this process. The limit for open files is raised as far as the process may.
    pub fn of_this_process() -> Self {
        // Without a limit it is as much as the processor can address: with 32 bits, less than the most tunnels take.
        let memory = memory::limit().and_then(|limit| limit.try_into().ok()).unwrap_or(usize::MAX);
        Self::within(open_files(), memory)
    }

    /// Half of the memory is for tunnels, and half for scrapes.
    fn within(files: usize, memory: usize) -> Self {
        let by_files = files.saturating_sub(OTHER_FILES) / FILES_PER_TUNNEL;
        let half = memory.saturating_sub(BASE_MEMORY) / 2;
        let within = |cost: usize| (half / cost).min(by_files).clamp(1, MAX_TUNNELS);
        let (tunnels, scrapes) = (within(TUNNEL_MEMORY), within(SCRAPE_MEMORY));
        let connections = scrapes.saturating_mul(2).min(tunnels.max(scrapes)) + SPARE_CONNECTIONS;
        Places { tunnels, scrapes, connections }
    }
}

/// The failure of a scrape that has no place.
pub fn busy() -> ScrapeError {
    ScrapeError::new(ScrapeReason::Busy, "too many scrapes at once")
}

/// The limit for open files, raised as far as the process may.
fn open_files() -> usize {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit); // if that fails, the limit does not change
    getrlimit(Resource::Nofile).current.and_then(|files| files.try_into().ok()).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_follow_from_files_and_memory() {
        let places = |tunnels, scrapes, connections| Places { tunnels, scrapes, connections };
        assert_eq!(Places::within(160, usize::MAX), places(32, 32, 48));
        assert_eq!(Places::within(0, usize::MAX), places(1, 1, 17));
        assert_eq!(Places::within(1_048_576, 64 << 20), places(1_228, 109, 234));
        assert_eq!(Places::within(1_048_576, 1 << 20), places(1, 1, 17));
        #[cfg(target_pointer_width = "64")]
        assert_eq!(Places::within(usize::MAX, usize::MAX), places(30_000, 30_000, 30_016));
        let all_of_32_bits = u32::MAX.try_into().unwrap();
        assert_eq!(Places::within(1_048_576, all_of_32_bits), places(30_000, 9_325, 18_666));
    }
}

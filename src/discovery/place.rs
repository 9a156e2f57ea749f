//! What is in the place of the target file.

use std::fs::{self, File, FileType};
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// What a list must not replace: a device that all programs of the machine use; a link, while Prometheus goes on to read the file
/// that it leads to; at the start, a text that is no list, such as a `prometheus.yml` that was named by mistake.
pub fn irreplaceable(path: &Path, is_start: bool) -> Option<&'static str> {
    let kind = fs::symlink_metadata(path).ok()?.file_type();
    let is_other = is_start && kind.is_file() && is_other_text(path);
    special(kind).or(is_other.then_some("a file with something else than targets"))
}

/// What a file of this type is, if a list must not replace it.
fn special(kind: FileType) -> Option<&'static str> {
    let kinds = [
        (kind.is_symlink(), "a link"),
        (kind.is_fifo(), "a pipe"),
        (kind.is_socket(), "a socket"),
        (kind.is_block_device() || kind.is_char_device(), "a device"),
    ];
    kinds.into_iter().find_map(|(is_it, name)| is_it.then_some(name))
}

/// Whether a file begins with a character that no list of targets begins with. What a crash left may begin with anything else.
fn is_other_text(path: &Path) -> bool {
    let mut start = Vec::new();
    let read = File::open(path).and_then(|file| file.take(256).read_to_end(&mut start));
    let first = start.trim_ascii_start().first();
    read.is_ok() && first.is_some_and(|byte| byte.is_ascii_graphic() && *byte != b'[')
}

/// Whether something is mounted at this path, as a container does with a single file. Only Linux tells, from 5.8 on.
#[cfg(not(target_os = "linux"))]
pub fn is_mounted(_: &Path) -> bool {
    false
}

#[cfg(target_os = "linux")]
pub fn is_mounted(path: &Path) -> bool {
    use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
    let found = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty());
    found.is_ok_and(|file| file.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

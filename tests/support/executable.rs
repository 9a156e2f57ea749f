//! Programs that a test puts somewhere and runs.
//!
//! Linux refuses to run a file that anybody holds open for writing ("Text file busy"). If this process writes it, a child that
//! another thread forks at that moment holds it too, for as long as it takes to become another program. So another process
//! writes it, whose files no child here inherits.

use std::fs;
use std::path::Path;
use std::process::Command;

/// A program made of these bytes.
pub fn write(path: &Path, content: impl AsRef<[u8]>) {
    let source = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(source.path(), content).expect("a temporary file");
    copy(source.path(), path);
}

/// A copy of this program.
pub fn copy(from: &Path, to: &Path) {
    let status = Command::new("install").args(["-m", "755"]).args([from, to]).status();
    assert!(status.is_ok_and(|status| status.success()), "`install` {from:?} {to:?}: it is part of coreutils");
}

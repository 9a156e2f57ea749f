//! Any bytes as the target file that an earlier run has left.
#![no_main]

use std::fs;
use std::process;

use baletheus::discovery::Sink;
use baletheus::discovery::target_file::TargetFile;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let path = std::env::temp_dir().join(format!("baletheus-fuzz-{}.json", process::id()));
    fs::write(&path, bytes).expect("a temporary file");
    let file = TargetFile::new(path, 0o644, false);
    if let Some(stored) = file.stored() {
        assert_eq!(stored.text, bytes);
    }
    let devices = file.published().unwrap_or_default();
    assert!(devices.iter().all(|device| !device.name.is_empty()));
});

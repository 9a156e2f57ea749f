//! What is read of a target file that an earlier run has left.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::mem;
use std::time::SystemTime;

use hyper::body::Bytes;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::entry::fingerprint;
use super::labels::{DEVICE_ID, DEVICE_NAME, META_DEVICE_NAME, SERVICE, UUID};
use crate::balena::display_name;
use crate::memory;

/// The largest list that is taken over at the start, in bytes. 100,000 devices take 70 MB.
const MAX_LIST_SIZE: u64 = 256 << 20;
/// The lowest bound of that list, in bytes.
const MIN_LIST_SIZE: u64 = 1 << 20;
/// That list may take this part of the memory limit. 20,000 devices take 14 MB, and the stack's sidecar has 64 MB.
const LISTS_IN_MEMORY: u64 = 4;
/// The longest line of a list of ours, in bytes: a target with 128 tags of 512 bytes, each of which may be an escape.
const MAX_LINE: u64 = 1 << 20;

/// How devices are ordered: by id, and those without one by name.
pub type Key<'a> = (Option<u64>, Cow<'a, str>);

/// A device that has targets in the file.
#[derive(Debug)]
pub struct StoredDevice {
    pub id: Option<u64>,
    pub name: Box<str>,
    pub groups: u64,
    /// Whether labels of a service declare an exporter of it.
    pub has_service: bool,
}

impl StoredDevice {
    /// Its place among other devices.
    pub fn key(&self) -> Key<'_> {
        (self.id, if self.id.is_none() { (&*self.name).into() } else { "".into() })
    }
}

/// A target group of ours: it has one target.
#[derive(Deserialize)]
struct OwnGroup<'a> {
    #[serde(borrow, rename = "targets")]
    _targets: [Cow<'a, str>; 1],
    #[serde(borrow)]
    labels: BTreeMap<Cow<'a, str>, Cow<'a, str>>,
}

/// Reads a target file of ours line by line, since a list may be too large to hold it twice.
///
/// # Errors
/// The file cannot be read, or it is none of ours.
pub fn read(file: File) -> io::Result<Vec<StoredDevice>> {
    let mut devices: Vec<StoredDevice> = Vec::new();
    let mut text = String::new(); // of the last device
    let (mut file, mut line) = (BufReader::new(file), String::new());
    // A longer line is cut, and is no group then.
    while file.by_ref().take(MAX_LINE).read_line(&mut line)? > 0 {
        let group = mem::take(&mut line);
        let group = group.trim_end_matches('\n').trim_end_matches(',');
        if matches!(group, "[" | "]" | "[]") {
            continue;
        }
        let OwnGroup { labels, .. } = serde_json::from_str(group)?;
        let label = |name: &str| labels.get(name).map(|value| &**value);
        let id = label(DEVICE_ID).and_then(|id| id.parse().ok());
        if let Some(last) = devices.last_mut().filter(|last| last.id == id) {
            text = text + ",\n" + group;
            last.groups = fingerprint(text.as_bytes());
            continue;
        }
        group.clone_into(&mut text);
        let name = label(DEVICE_NAME).or_else(|| label(META_DEVICE_NAME));
        let name = display_name(name, label(UUID), id).into();
        let has_service = label(SERVICE).is_some();
        devices.push(StoredDevice { id, name, groups: fingerprint(text.as_bytes()), has_service });
    }
    Ok(devices)
}

/// A list that an earlier run has left.
#[derive(Clone)]
pub struct StoredList {
    pub text: Bytes,
    pub changed: SystemTime,
    pub targets: usize,
}

impl StoredList {
    /// Reads a file, if it holds a list, of whatever program.
    pub fn read(file: File) -> Option<Self> {
        #[derive(Deserialize)]
        struct AnyGroup {
            targets: Vec<IgnoredAny>,
        }
        let changed = file.metadata().ok()?.modified().ok()?;
        let mut text = Vec::new();
        let bound = memory::bound(LISTS_IN_MEMORY, MIN_LIST_SIZE, MAX_LIST_SIZE);
        file.take(bound).read_to_end(&mut text).ok()?;
        let groups: Vec<AnyGroup> = serde_json::from_slice(&text).ok()?;
        let targets = groups.iter().map(|group| group.targets.len()).sum();
        Some(StoredList { text: text.into(), changed, targets })
    }
}

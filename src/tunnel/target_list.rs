//! The content of a target file, as far as the tunnel needs it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use thiserror::Error;
use tokio::time::Instant;

use crate::memory;
use crate::values::prometheus_duration;

/// The largest target file, in bytes: as much as discovery writes, and less on a 32-bit processor, which has no room for that
/// and for what is made of it.
const MAX_FILE: u64 = if usize::BITS < 64 { 1 << 28 } else { 1 << 30 };
/// The lowest bound of the file, in bytes.
const MIN_MAX_FILE: u64 = 1 << 20;
/// The file may take this part of the memory limit: while it is read, the old list, the text and the new list are there.
const FILES_IN_MEMORY: u64 = 8;
/// The path of targets that name none, unless the scrape config has another one.
const DEFAULT_PATH: &str = "/metrics";

pub type TargetList = HashMap<Arc<str>, Arc<Destination>>;

/// A host and port that the tunnel may go to.
#[derive(Debug)]
pub struct Destination {
    /// `host:port`, in lower case.
    pub address: Arc<str>,
    /// Whether a target group with it has the scheme https.
    pub is_https: bool,
    /// Since when the file lists it.
    pub listed: Instant,
    /// The longest time-out of a scrape that the file sets.
    pub timeout: Option<Duration>,
    /// What is scraped there: one exporter for each path.
    pub exporters: Vec<Arc<ListedExporter>>,
}

impl Destination {
    /// The host: all targets with the same one are of one device.
    pub fn device(&self) -> &str {
        device_of(&self.address)
    }

    /// The exporters at this path; all of them if there is no path. A single one answers for any path, since a scrape config or
    /// a redirect may set another one.
    pub fn exporters_at(&self, path: Option<&str>) -> impl Iterator<Item = &Arc<ListedExporter>> {
        let path = path.filter(|_| self.exporters.len() > 1);
        self.exporters.iter().filter(move |exporter| path.is_none_or(|path| exporter.path() == path))
    }
}

/// The host of an address.
pub fn device_of(address: &str) -> &str {
    address.rsplit_once(':').map_or(address, |(host, _)| host)
}

/// An exporter, by the labels that Prometheus gives to its series.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ListedExporter {
    /// The label `uuid`; empty without one.
    pub uuid: Box<str>,
    /// The label `job`; empty if the scrape config sets it.
    pub job: Box<str>,
    /// The label `instance`: the address, unless the file has another one.
    pub instance: Arc<str>,
    /// Its target's address.
    pub address: Arc<str>,
    /// None for [`DEFAULT_PATH`].
    path: Option<Box<str>>,
}

impl ListedExporter {
    fn path(&self) -> &str {
        self.path.as_deref().unwrap_or(DEFAULT_PATH)
    }
}

/// A target group of any program that writes target files. Other labels are not read.
#[derive(Deserialize)]
struct Group {
    targets: Vec<String>,
    labels: Option<Labels>,
}

#[derive(Default, Deserialize)]
struct Labels {
    uuid: Option<String>,
    job: Option<String>,
    instance: Option<String>,
    #[serde(rename = "__scheme__")]
    scheme: Option<String>,
    #[serde(rename = "__metrics_path__")]
    path: Option<String>,
    #[serde(rename = "__scrape_timeout__")]
    timeout: Option<String>,
}

#[derive(Debug, Error)]
pub enum BadTargetFile {
    #[error("cannot be read: {0}")]
    Unreadable(#[from] io::Error),
    /// Reading a pipe would block until somebody writes into it.
    #[error("is no file")]
    NoFile,
    /// It is larger than so many MiB.
    #[error("is too large: the bound is {0} MiB, an eighth of the memory limit if there is one")]
    TooLarge(u64),
    #[error("is no target file: {0}")]
    Invalid(#[from] serde_json::Error),
    #[error("holds no target")]
    Empty,
}

/// Reads a target file. Targets that were in `before` keep the time since which they are listed.
pub fn read(path: &Path, before: &TargetList) -> Result<TargetList, BadTargetFile> {
    let text = read_bounded(path)?;
    let groups: Vec<Group> = serde_json::from_slice(&text)?;
    drop(text);
    let (mut list, now) = (HashMap::<Arc<str>, Destination>::new(), Instant::now());
    for Group { targets, labels } in groups {
        let labels = labels.unwrap_or_default();
        for name in targets {
            let address: Arc<str> = name.to_ascii_lowercase().into();
            let target = list.entry(address.clone()).or_insert_with(|| Destination {
                listed: before.get(&address).map_or(now, |before| before.listed),
                address: address.clone(),
                is_https: false,
                timeout: None,
                exporters: Vec::with_capacity(1),
            });
            target.is_https |= labels.scheme.as_deref() == Some("https");
            let timeout = labels.timeout.as_deref().and_then(|text| prometheus_duration(text).ok());
            target.timeout = target.timeout.max(timeout.map(Duration::from_millis));
            let exporter = Arc::new(ListedExporter {
                uuid: labels.uuid.as_deref().unwrap_or_default().into(),
                job: labels.job.as_deref().unwrap_or_default().into(),
                instance: match labels.instance.as_deref().unwrap_or(&name) {
                    same if *same == *address => address.clone(),
                    other => other.into(),
                },
                address,
                path: labels.path.as_deref().map(Box::from),
            });
            if !target.exporters.contains(&exporter) {
                target.exporters.push(exporter);
            }
        }
    }
    if list.is_empty() {
        return Err(BadTargetFile::Empty);
    }
    Ok(list.into_iter().map(|(address, target)| (address, Arc::new(target))).collect())
}

/// The text of the file, which is no larger than memory allows.
fn read_bounded(path: &Path) -> Result<Vec<u8>, BadTargetFile> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(BadTargetFile::NoFile);
    }
    let max = memory::bound(FILES_IN_MEMORY, MIN_MAX_FILE, MAX_FILE);
    let mut text = Vec::new();
    // Its length comes first, since reading the file takes as much memory.
    if metadata.len() <= max {
        File::open(path)?.take(max + 1).read_to_end(&mut text)?;
        if text.len() as u64 <= max {
            return Ok(text);
        }
    }
    Err(BadTargetFile::TooLarge(max >> 20))
}

//! The target file. What stands in it is replaced whole, atomically and durably, and only by something else.

use std::fs::{self, File, Permissions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::config;
use crate::device::display_name;
use crate::discovery::{Failure, Published, Sink};
use crate::inventory::{Entry, Inventory, State, fingerprint};
use crate::target::{DEVICE_ID, META_PREFIX, UUID};

/// The target file, and the folder beside it where the next one is written.
///
/// The folder is in the same volume, so that a rename is atomic, and not in the directory that Prometheus watches,
/// where each event makes it read all target files again.
pub struct Registry {
    path: PathBuf,
    scratch: PathBuf,
    mode: u32,
    write_empty: bool,
    /// What the file looked like when it was last known to hold the list.
    seen: Option<Look>,
}

/// Device, inode, size and time of change: another process that replaces the file changes one of them.
type Look = (u64, u64, u64, i64, i64);

impl Registry {
    /// Touches nothing yet.
    pub fn new(file: config::File) -> Self {
        let name = file.path.file_name().unwrap_or_default().to_string_lossy();
        let scratch = directory(&file.path).join(format!(".{}.tmp", name.trim_start_matches('.')));
        Registry { path: file.path, scratch, mode: file.mode, write_empty: file.write_empty, seen: None }
    }

    fn look(&self) -> Option<Look> {
        let look = fs::metadata(&self.path).ok()?;
        Some((look.dev(), look.ino(), look.size(), look.mtime(), look.mtime_nsec()))
    }

    fn failed(&self, doing: &str, error: &io::Error) -> Failure {
        let hint = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "free some space",
            io::ErrorKind::PermissionDenied => "let this user write there",
            io::ErrorKind::ReadOnlyFilesystem => "mount it writable, or set --sd-file (SD_FILE_PATH)",
            _ => "is --sd-file (SD_FILE_PATH) right?",
        };
        Failure::new("write", format!("cannot {doing} {}: {error}; {hint}", self.path.display()))
    }

    /// The file, if it is one: a pipe would block, a directory cannot be replaced.
    fn open(&self) -> io::Result<File> {
        if fs::metadata(&self.path)?.is_file() {
            return File::open(&self.path);
        }
        Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"))
    }

    fn holds(&self, list: &Inventory) -> io::Result<bool> {
        let mut file = BufReader::new(self.open()?);
        let mut buffer = Vec::new();
        for part in parts(list) {
            buffer.resize(part.len(), 0);
            match file.read_exact(&mut buffer) {
                Ok(()) if buffer == part => {}
                Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error),
                _ => return Ok(false),
            }
        }
        Ok(file.read(&mut [0])? == 0)
    }

    fn write(&self, list: &Inventory) -> io::Result<()> {
        fs::create_dir_all(&self.scratch)?;
        let file = tempfile::Builder::new().prefix("new-").tempfile_in(&self.scratch)?;
        let mut writer = BufWriter::new(file);
        parts(list).try_for_each(|part| writer.write_all(part))?;
        let file = writer.into_inner()?;
        // Before the rename: a change of mode triggers nothing in Prometheus.
        file.as_file().set_permissions(Permissions::from_mode(self.mode))?;
        file.as_file().sync_all()?;
        file.persist(&self.path)?;
        File::open(directory(&self.path))?.sync_all()
    }
}

impl Sink for Registry {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn held(&self) -> Option<Vec<Entry>> {
        match self.open() {
            Ok(file) => read(file).ok(),
            Err(error) => (error.kind() == io::ErrorKind::NotFound).then(Vec::new),
        }
    }

    fn publish(&mut self, list: &Inventory) -> Result<Published, Failure> {
        if !list.changed && self.seen.is_some() && self.seen == self.look() {
            return Ok(Published::Unchanged);
        }
        self.seen = None;
        match self.holds(list) {
            Ok(true) => {
                let mode = Permissions::from_mode(self.mode);
                fs::set_permissions(&self.path, mode).map_err(|error| self.failed("set the mode of", &error))?;
                self.seen = self.look();
                return Ok(Published::Unchanged);
            }
            Ok(false) => {
                // a file that cannot be read as a list is no reason to drop what Prometheus still has from it
                let is_empty = self.held().is_some_and(|held| held.is_empty());
                if list.texts().next().is_none() && !is_empty && !self.write_empty {
                    return Ok(Published::Refused);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(self.failed("read", &error)),
        }
        self.write(list).map_err(|error| self.failed("write", &error))?;
        self.seen = self.look();
        Ok(Published::Written)
    }
}

/// The list as it stands in a file: JSON with a target group a line.
pub fn parts(list: &Inventory) -> impl Iterator<Item = &[u8]> {
    let mut first = true;
    let groups = list.texts().flat_map(move |text| {
        let before: &[u8] = if std::mem::take(&mut first) { b"[\n" } else { b",\n" };
        [before, text]
    });
    let end: &[u8] = if list.texts().next().is_some() { b"\n]\n" } else { b"[]\n" };
    groups.chain([end])
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// What a target file of ours holds, group by group: a list may be larger than memory allows to hold twice.
fn read(file: File) -> serde_json::Result<Vec<Entry>> {
    struct Groups;
    impl<'de> Visitor<'de> for Groups {
        type Value = Vec<Entry>;

        fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
            f.write_str("a list of target groups")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut groups: A) -> Result<Vec<Entry>, A::Error> {
            let mut entries: Vec<Entry> = Vec::new();
            let mut text = String::new();
            while let Some(group) = groups.next_element::<Box<RawValue>>()? {
                let (id, name) = identity(&group);
                match entries.last_mut() {
                    Some(Entry { id: last, state: State::Listed { targets, print }, .. }) if *last == id && id > 0 => {
                        text = text + ",\n" + group.get();
                        (*targets, *print) = (*targets + 1, fingerprint(text.as_bytes()));
                    }
                    _ => {
                        group.get().clone_into(&mut text);
                        let state = State::Listed { targets: 1, print: fingerprint(text.as_bytes()) };
                        entries.push(Entry { id, name: name.into(), state });
                    }
                }
            }
            Ok(entries)
        }
    }
    serde_json::Deserializer::from_reader(BufReader::new(file)).deserialize_seq(Groups)
}

fn identity(group: &RawValue) -> (u64, String) {
    #[derive(Deserialize)]
    struct Group {
        labels: serde_json::Map<String, serde_json::Value>,
    }
    let Ok(Group { labels }) = serde_json::from_str(group.get()) else { return (0, String::new()) };
    let label = |name: &str| labels.get(name).and_then(|value| value.as_str());
    let name = label("device_name").or_else(|| label(&format!("{META_PREFIX}device_name")));
    let id = label(DEVICE_ID).and_then(|id| id.parse().ok());
    (id.unwrap_or_default(), display_name(name, label(UUID), id))
}

//! The target file: a list replaces another one whole, atomically and durably, and only if it differs.

use std::fs::{self, DirEntry, File, Metadata, Permissions, TryLockError};
use std::io::{self, BufReader, BufWriter, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::earlier_list::{self, StoredDevice, StoredList};
use super::inventory::Inventory;
use super::sink::{Published, Sink};
use super::target_groups;
use crate::balena::{Failure, Reason};

/// The beginning of the names of unfinished files.
const PREFIX: &str = "new-";
/// How many random letters and digits follow it.
const RANDOM_LENGTH: usize = 6;

/// The target file, and the folder beside it where the next one is written.
///
/// The folder is in the same volume, so that a rename is atomic. It is not the directory that Prometheus watches, where each
/// event makes Prometheus read all target files again.
pub struct TargetFile {
    path: PathBuf,
    scratch: PathBuf,
    mode: u32,
    write_empty: bool,
    /// Whether the file system keeps the permissions that a file is given, as far as is known.
    keeps_mode: bool,
    /// Locked while this process is the one that writes.
    lock: Option<File>,
    /// The file's identity when it last held the list, and the list's version.
    seen: Option<(Identity, u64)>,
    /// Whether the last list of this process has targets, whatever became of the file since.
    has_targets: bool,
}

/// Device, inode, size and times of change: whatever replaces a file, writes it or changes its permissions changes one of them.
pub type Identity = (u64, u64, u64, [i64; 4]);

/// The identity of the file at this path, if there is one.
pub fn identity(path: &Path) -> Option<Identity> {
    let file = fs::metadata(path).ok()?;
    let times = [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()];
    Some((file.dev(), file.ino(), file.size(), times))
}

impl TargetFile {
    /// Touches nothing yet.
    pub fn new(path: PathBuf, mode: u32, write_empty: bool) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let scratch = directory(&path).join(format!(".{name}.tmp"));
        TargetFile { path, scratch, mode, write_empty, keeps_mode: true, lock: None, seen: None, has_targets: false }
    }

    /// Makes the folder and locks it, so that two sidecars do not write one file by mistake. Removes what a killed run left
    /// there.
    ///
    /// # Errors
    /// The folder cannot be used. `WouldBlock` means that another process writes this file, `AlreadyExists` that something else
    /// than a file is in its place.
    pub fn lock(&mut self) -> io::Result<()> {
        self.check_place()?;
        let path = self.scratch.join("lock");
        let inode = |file: io::Result<Metadata>| file.ok().map(|file| (file.dev(), file.ino()));
        if self.lock.as_ref().is_some_and(|lock| inode(lock.metadata()) == inode(fs::metadata(&path))) {
            return Ok(());
        }
        self.make_scratch()?;
        // This neither waits for a pipe nor empties what a link leads to.
        let lock = File::options().read(true).append(true).create(true).open(&path)?;
        // On a file system without locks the file is written all the same.
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, "another baletheus writes it"));
        }
        for left in fs::read_dir(&self.scratch)?.flatten().filter(is_unfinished) {
            let _ = fs::remove_file(left.path()); // the next start tries again
        }
        self.lock = Some(lock);
        Ok(())
    }

    /// Refuses what a list must not replace: a device that all programs of the machine use; a link, while Prometheus goes on to read
    /// the file that it leads to; at the start, a text that is no list, such as a `prometheus.yml` that was named by mistake.
    fn check_place(&self) -> io::Result<()> {
        let Ok(found) = fs::symlink_metadata(&self.path) else { return Ok(()) };
        let kind = found.file_type();
        let is_start = self.lock.is_none();
        let kinds = [
            (kind.is_symlink(), "a link"),
            (kind.is_fifo(), "a pipe"),
            (kind.is_socket(), "a socket"),
            (kind.is_block_device() || kind.is_char_device(), "a device"),
            (is_start && kind.is_file() && is_other_text(&self.path), "a file with something else than targets"),
        ];
        match kinds.into_iter().find(|(is_it, _)| *is_it) {
            Some((_, name)) => Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("it is {name}"))),
            None => Ok(()),
        }
    }

    /// Makes the folder, unless it is there. A folder that somebody else owns, or a link, could make this program remove others'
    /// files. A directory that has vanished since the start may be a disk that is not mounted: it is not made again.
    fn make_scratch(&self) -> io::Result<()> {
        if let Some(lock) = &self.lock {
            let device = |path: &Path| fs::metadata(path).map(|found| found.dev());
            let (is, above) = (device(directory(&self.path))?, device(&directory(&self.path).join(".."))?);
            if is != lock.metadata()?.dev() && is == above {
                return Err(io::Error::new(io::ErrorKind::NotFound, "nothing is mounted there any more"));
            }
        }
        let folder = directory(&self.path);
        if self.lock.is_none() && !folder.exists() {
            if folder.is_symlink() {
                return Err(io::Error::new(io::ErrorKind::NotFound, "its folder is a link to nothing"));
            }
            fs::create_dir_all(folder)?;
            log::warn!("made the folder {}: it was not there", folder.display());
        }
        fs::create_dir(&self.scratch).or_else(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Ok(()),
            _ => Err(error),
        })?;
        let (folder, above) = (fs::symlink_metadata(&self.scratch)?, fs::metadata(directory(&self.path))?);
        // Some file systems give all their files one owner.
        let is_ours = folder.uid() == rustix::process::geteuid().as_raw() || folder.uid() == above.uid();
        if folder.is_dir() && is_ours {
            return Ok(());
        }
        let folder = self.scratch.display();
        Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("{folder} is no folder of this user: remove it")))
    }

    /// The failure for an error with the file.
    pub fn failure(&self, error: &io::Error) -> Failure {
        let path = self.path.display();
        let scratch = self.scratch.display();
        let folder = directory(&self.path).display();
        let what_to_do = match error.kind() {
            io::ErrorKind::WouldBlock => "stop the other one".to_owned(),
            io::ErrorKind::AlreadyExists => "remove it, if only this program uses it".to_owned(),
            io::ErrorKind::CrossesDevices => format!("something is mounted at {scratch}: unmount it"),
            io::ErrorKind::NotFound => "its directory is gone: is a disk not mounted?".to_owned(),
            io::ErrorKind::IsADirectory if self.path.is_dir() => format!("remove the directory {path}"),
            io::ErrorKind::IsADirectory => format!("remove the directory {scratch}/lock"),
            io::ErrorKind::NotADirectory => format!("{folder} is a file, not a directory"),
            kind if kind == io::ErrorKind::ResourceBusy || is_mounted(&self.path) => {
                "a file that is mounted cannot be replaced: mount its directory instead".to_owned()
            }
            _ => format!("check the permissions and the free space of {folder} and {scratch}"),
        };
        let message = format!("cannot write {path}: {error}; {what_to_do}, or set another --sd-file (SD_FILE_PATH)");
        Failure::new(Reason::Write, message)
    }

    /// Opens the file, if it is a regular one: a pipe would block.
    fn open(&self) -> io::Result<File> {
        let is_file = fs::metadata(&self.path)?.is_file();
        if is_file { File::open(&self.path) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    /// The list that is there, if it is one.
    pub fn stored(&self) -> Option<StoredList> {
        StoredList::read(self.open().ok()?)
    }

    fn holds(&self, list: &Inventory) -> io::Result<bool> {
        let file = self.open()?;
        if self.keeps_mode && file.metadata()?.mode() & 0o777 != self.mode {
            return Ok(false);
        }
        target_groups::are_in(list.entries(), BufReader::new(file))
    }

    fn write(&mut self, list: &Inventory) -> io::Result<()> {
        self.lock()?;
        // Where the permissions cannot be set afterwards, these hold, less the umask.
        let permissions = Permissions::from_mode(self.mode);
        let mut builder = tempfile::Builder::new();
        let file =
            builder.prefix(PREFIX).rand_bytes(RANDOM_LENGTH).permissions(permissions).tempfile_in(&self.scratch)?;
        let mut writer = BufWriter::with_capacity(1 << 16, file);
        target_groups::write(list.entries(), &mut writer)?;
        let file = writer.into_inner()?;
        // Before the rename: a change of mode triggers nothing in Prometheus.
        self.set_mode(file.as_file());
        sync(file.as_file())?;
        file.persist(&self.path)?;
        // The list is there now, whatever becomes of the rest. Some network and FUSE file systems sync no directory.
        if let Err(error) = File::open(directory(&self.path)).and_then(|directory| directory.sync_all()) {
            let path = self.path.display();
            log::debug!(
                "cannot sync the directory of {path}: {error}; after a power failure it may hold the list before"
            );
        }
        Ok(())
    }

    /// Sets the permissions. vfat, exFAT and CIFS refuse or ignore them: the list matters more.
    fn set_mode(&mut self, file: &File) {
        let set = file.set_permissions(Permissions::from_mode(self.mode)).and_then(|()| file.metadata());
        let failed = match set {
            Ok(file) if file.mode() & 0o777 == self.mode => None,
            Ok(file) => Some(format!("they stay {:04o}", file.mode() & 0o777)),
            Err(error) => Some(error.to_string()),
        };
        self.keeps_mode = failed.is_none();
        if let Some(why) = failed {
            log::debug!("cannot set the permissions of {} to {:04o}: {why}", self.path.display(), self.mode);
        }
    }
}

impl Sink for TargetFile {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn stays(&self) -> String {
        use io::ErrorKind::{NotADirectory, NotFound};
        let found = fs::symlink_metadata(&self.path);
        let is_missing = found.is_err_and(|error| matches!(error.kind(), NotFound | NotADirectory));
        format!("; {} {}", self.name(), if is_missing { "does not exist" } else { "stays as it is" })
    }

    fn published(&self) -> Option<Vec<StoredDevice>> {
        match self.open() {
            Ok(file) => earlier_list::read(file).ok(),
            Err(error) => (error.kind() == io::ErrorKind::NotFound).then(Vec::new),
        }
    }

    fn publish(&mut self, list: &Inventory) -> Result<Published, Failure> {
        // An empty list is held back before anything can fail: a failure of the file publishes the list by HTTP all the same.
        let has_targets = list.has_targets();
        let are_there = || self.has_targets || self.published().is_none_or(|devices| !devices.is_empty());
        if !has_targets && !self.write_empty && are_there() {
            return Ok(Published::HeldBack);
        }
        self.has_targets = has_targets;
        self.check_place().map_err(|error| self.failure(&error))?;
        if self.seen.is_some() && self.seen == identity(&self.path).map(|identity| (identity, list.version())) {
            return Ok(Published::Unchanged);
        }
        // A file that cannot be read or ends too early is replaced.
        let holds = self.holds(list).unwrap_or(false);
        if !holds {
            self.seen = None;
            self.write(list).map_err(|error| self.failure(&error))?;
        }
        self.seen = identity(&self.path).map(|identity| (identity, list.version()));
        Ok(if holds { Published::Unchanged } else { Published::Written })
    }
}

/// Whether it is what a killed run left: a file with the name that `tempfile` gives.
fn is_unfinished(entry: &DirEntry) -> bool {
    let name = entry.file_name();
    let random = name.to_str().and_then(|name| name.strip_prefix(PREFIX)).unwrap_or_default();
    let is_random = random.len() == RANDOM_LENGTH && random.bytes().all(|byte| byte.is_ascii_alphanumeric());
    is_random && entry.file_type().is_ok_and(|kind| kind.is_file())
}

/// Waits until the file is on the disk. Some network and FUSE file systems do not know how: the list matters more.
fn sync(file: &File) -> io::Result<()> {
    match file.sync_all() {
        Err(error) if matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput) => {
            log::debug!("cannot sync the list: {error}; a power failure may cost it");
            Ok(())
        }
        result => result,
    }
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
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
fn is_mounted(_: &Path) -> bool {
    false
}

#[cfg(target_os = "linux")]
fn is_mounted(path: &Path) -> bool {
    use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
    let found = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty());
    found.is_ok_and(|file| file.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

//! The API key: it never prints, and a file that holds it is read again when the key is refused.

use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What to do about a key of the wrong kind.
pub const CREATE_KEY: &str =
    "create a named API key (balenaCloud's dashboard, Preferences, Access tokens) and set API_KEY to it";
/// The largest key file, in bytes.
const MAX_FILE_SIZE: u64 = 4096;

/// A checked key.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// Checks a key.
    ///
    /// # Errors
    /// It cannot be sent in a header. The text never shows the key.
    pub fn new(text: &str) -> Result<Self, String> {
        let key = text.trim();
        if key.is_empty() {
            return Err("is empty".into());
        }
        if key.starts_with(['"', '\'']) || key.ends_with(['"', '\'']) {
            return Err("has a quote at its beginning or end, which is no part of a key: remove it".into());
        }
        match key.bytes().position(|b| !b.is_ascii_graphic()) {
            Some(at) => Err(format!(
                "contains a line break, a blank or a non-ASCII character after {at} characters; copy the key again"
            )),
            None => Ok(ApiKey(key.to_owned())),
        }
    }

    /// Reads a key from a file of at most 4 KiB.
    ///
    /// # Errors
    /// The file cannot be read, or it holds no key. The text never shows the key.
    pub fn read(path: &Path) -> Result<Self, String> {
        let mut text = String::new();
        let read = File::open(path).and_then(|file| file.take(MAX_FILE_SIZE).read_to_string(&mut text));
        read.map_err(|error| format!("cannot be read: {error}"))?;
        Self::new(&text)
    }

    /// The secret, for the request.
    pub fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

/// The key in use, and the file that it came from. Clones share the key.
#[derive(Clone, Debug)]
pub struct KeySource {
    key: Arc<Mutex<ApiKey>>,
    file: Option<PathBuf>,
}

impl KeySource {
    /// A key, and the file that it was read from, if any.
    pub fn new(key: ApiKey, file: Option<PathBuf>) -> Self {
        KeySource { key: Arc::new(Mutex::new(key)), file }
    }

    /// The key to use now.
    pub fn current(&self) -> ApiKey {
        self.lock().clone()
    }

    /// Whether there is another key to try than the refused one. Reads the file again, unless another thread has renewed the key
    /// in the meantime. Blocks on the file system.
    pub fn renew(&self, refused: &ApiKey) -> bool {
        if self.current() == *refused
            && let Some(file) = &self.file
            // Reading a pipe would block until somebody writes into it.
            && fs::metadata(file).is_ok_and(|file| file.is_file())
            && let Ok(key) = ApiKey::read(file)
        {
            *self.lock() = key;
        }
        self.current() != *refused
    }

    fn lock(&self) -> MutexGuard<'_, ApiKey> {
        self.key.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

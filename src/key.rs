//! The API key: what it cannot be, and its renewal from its file when it is refused.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::secret::{self, BadSecret, Secret};

/// What to do about a key of the wrong kind.
pub const CREATE_KEY: &str =
    "create a named API key (balenaCloud's dashboard, Preferences, Access tokens) and set API_KEY to it";
/// Words of placeholders.
const PLACEHOLDERS: [&str; 12] = [
    "your", "api_key", "api-key", "apikey", "changeme", "holder", "paste", "replace", "example", "todo", "none", "null",
];
/// A named key has as many letters and digits.
const KEY_LENGTH: usize = 32;

/// A shorter text is no key, and may be a part of other words.
const MIN_SIZE: usize = 8;

/// Checks a key.
///
/// # Errors
/// It is none.
pub fn key(text: &str) -> Result<Secret, BadSecret> {
    let text = text.trim();
    // A line of an env file, of a script, of a YAML file, or of a header.
    let (name, _) = text.split_once(['=', ':', ' ']).unwrap_or_default();
    let variable = text.strip_prefix("export ").and_then(|rest| rest.split_once('=')).map_or(name, |(name, _)| name);
    let upper = variable.to_ascii_uppercase();
    if upper.ends_with("KEY") || upper.ends_with("TOKEN") || upper == "BEARER" {
        let before = text.find(variable).unwrap_or_default() + variable.len() + 1;
        return Err(BadSecret::Prefix(text[..before].trim_end().to_owned()));
    }
    let lower = text.to_ascii_lowercase();
    // A key may have such letters by chance.
    let is_unlike_a_key = text.len() < KEY_LENGTH || !text.bytes().any(|byte| byte.is_ascii_digit());
    let has_word = || PLACEHOLDERS.iter().any(|word| lower.contains(word));
    let repeats = || text.len() > 1 && text.chars().all(|c| text.starts_with(c));
    if text.contains(['<', '>', '{', '}', '$']) || (is_unlike_a_key && (has_word() || repeats())) {
        return Err(BadSecret::Placeholder);
    }
    Secret::new(text)
}

/// A text without this key, which may be typed in a wrong place.
pub fn without_key(text: &str, key: &str) -> String {
    let key = key.trim();
    if key.len() < MIN_SIZE { text.to_owned() } else { text.replace(key, "(the API key)") }
}

/// Reads a key from its file.
///
/// # Errors
/// The file cannot be read, or it holds no key.
pub fn read(path: &Path) -> Result<Secret, BadSecret> {
    key(&secret::text(path)?)
}

/// The key in use, and the file that it came from. Clones share the key.
#[derive(Clone, Debug)]
pub struct KeySource {
    key: Arc<Mutex<Secret>>,
    file: Option<PathBuf>,
}

impl KeySource {
    /// A key, and the file that it was read from, if any.
    pub fn new(key: Secret, file: Option<PathBuf>) -> Self {
        KeySource { key: Arc::new(Mutex::new(key)), file }
    }

    /// A warning if others than its owner may write the file: they choose whose devices are listed.
    pub fn warning(&self) -> Option<String> {
        let file = self.file.as_ref()?;
        let mode = fs::metadata(file).ok()?.mode();
        let warning = || format!("others may write the key file {}: chmod go-w it", file.display());
        (mode & 0o022 != 0).then(warning)
    }

    /// The key to use now.
    pub fn current(&self) -> Secret {
        self.key.lock().clone()
    }

    /// Whether there is another key to try than the refused one. Reads the file again, unless another thread has renewed the key
    /// in the meantime. Blocks on the file system.
    pub fn renew(&self, refused: &Secret) -> bool {
        if self.current() == *refused
            && let Some(file) = &self.file
            // Reading a pipe would block until somebody writes into it.
            && fs::metadata(file).is_ok_and(|file| file.is_file())
            && let Ok(key) = read(file)
        {
            *self.key.lock() = key;
        }
        self.current() != *refused
    }

    /// Why the key's file holds no key now, for a message about a key that is refused.
    pub fn trouble(&self) -> Option<String> {
        let file = self.file.as_ref()?;
        let why = match fs::metadata(file) {
            Ok(found) if !found.is_file() => "is no file".to_owned(),
            _ => read(file).err()?.to_string(),
        };
        Some(format!("the key file {} {why}, so the old key stays", file.display()))
    }
}

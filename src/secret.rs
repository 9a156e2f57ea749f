//! A secret from a variable or a file, which never prints: the API key, or a token. What it cannot be.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use thiserror::Error;

/// The largest file of a secret, in bytes.
const MAX_FILE_SIZE: u64 = 4096;

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

/// A text that can be sent in a header.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

/// What is wrong with a secret, as the end of a sentence. No text shows it.
#[derive(Debug, Error)]
pub enum BadSecret {
    #[error("cannot be read: {0}")]
    Unreadable(#[from] io::Error),
    /// It would block, or be another secret, if it was read again.
    #[error("is no file")]
    NoFile,
    /// Its file is no file of a secret.
    #[error("is larger than {}", binary(*.0))]
    TooLarge(u64),
    /// Windows' editors write this.
    #[error("is UTF-16: save it as UTF-8")]
    Utf16,
    #[error("is empty")]
    Empty,
    /// Docker's `--env-file` keeps quotes.
    #[error("has a quote at its beginning or end, which is no part of it: remove it")]
    Quote,
    /// It cannot be sent.
    #[error("contains a line break, a blank or a non-ASCII character after {0} characters; copy it again")]
    Character(usize),
    /// It is a line of an env file, or of a header.
    #[error("begins with {0}, which is no part of it: remove that")]
    Prefix(String),
    #[error("holds a placeholder: replace it")]
    Placeholder,
    #[error("has fewer than {0} characters")]
    Short(usize),
}

impl Secret {
    /// Checks a secret. White space around it is no part of it.
    ///
    /// # Errors
    /// It cannot be sent in a header.
    pub fn new(text: &str) -> Result<Self, BadSecret> {
        let text = text.trim();
        if text.is_empty() {
            return Err(BadSecret::Empty);
        }
        if text.starts_with(['"', '\'']) || text.ends_with(['"', '\'']) {
            return Err(BadSecret::Quote);
        }
        match text.bytes().position(|b| !b.is_ascii_graphic()) {
            Some(at) => Err(BadSecret::Character(at)),
            None => Ok(Secret(text.to_owned())),
        }
    }

    /// The secret, for a request.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

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

/// Reads the text of a file of at most 4 KiB, without a byte order mark.
///
/// # Errors
/// The file cannot be read, or it holds no text.
pub fn text(path: &Path) -> Result<String, BadSecret> {
    let bytes = bytes(path, MAX_FILE_SIZE)?;
    String::from_utf8(bytes).map_err(|error| BadSecret::Character(error.utf8_error().valid_up_to()))
}

/// Reads the text of a file once more. Reading a pipe would block until somebody writes into it, or take the secret from who reads
/// it then.
///
/// # Errors
/// It is no file, it cannot be read, or it holds no text.
pub fn text_again(path: &Path) -> Result<String, BadSecret> {
    if fs::metadata(path)?.is_file() { text(path) } else { Err(BadSecret::NoFile) }
}

/// Reads a file of at most this size, without a byte order mark.
///
/// # Errors
/// The file cannot be read, or it is UTF-16.
pub fn bytes(path: &Path, max_size: u64) -> Result<Vec<u8>, BadSecret> {
    let mut bytes = Vec::new();
    File::open(path)?.take(max_size + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_size {
        return Err(BadSecret::TooLarge(max_size));
    }
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err(BadSecret::Utf16);
    }
    Ok(bytes.strip_prefix(b"\xef\xbb\xbf").map(<[u8]>::to_vec).unwrap_or(bytes))
}

/// `4 KiB`, `16 MiB`.
fn binary(bytes: u64) -> String {
    if bytes < 1 << 20 { format!("{} KiB", bytes >> 10) } else { format!("{} MiB", bytes >> 20) }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

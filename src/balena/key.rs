//! The API key, which never prints.

use std::fmt;
use std::io::Read;
use std::path::Path;

/// A key that never prints.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// Checks a key; the error never shows it.
    pub fn new(text: &str) -> Result<Self, String> {
        match (text.trim(), text.trim().bytes().position(|b| !b.is_ascii_graphic())) {
            ("", _) => Err("is empty".into()),
            (_, Some(at)) => Err(format!("holds a line break, blank or non-ASCII after {at} characters; copy it anew")),
            (key, None) => Ok(ApiKey(key.to_owned())),
        }
    }

    /// Reads it from a file of at most 4 KiB.
    pub fn read(path: &Path) -> Result<Self, String> {
        let mut text = String::new();
        let read = std::fs::File::open(path).and_then(|file| file.take(4096).read_to_string(&mut text));
        read.map_err(|error| format!("cannot be read: {error}"))?;
        Self::new(&text)
    }

    /// The secret itself, for the request.
    pub fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

//! What is wrong with the options.

use thiserror::Error;

use crate::secret::BadSecret;
use crate::values::BadValue;

impl ConfigError {
    /// Whether another start may succeed without a change: a file may be on a mount that comes later, and a name may resolve
    /// then.
    pub fn may_pass(&self) -> bool {
        match self {
            ConfigError::Value { why, .. } => why.may_pass,
            // What is no path is the secret itself, by mistake.
            ConfigError::SecretFile { value, why: BadSecret::Unreadable(error), .. } => {
                error.kind() == std::io::ErrorKind::NotFound && value.contains('/')
            }
            _ => false,
        }
    }
}

/// A mistake in the configuration. `given` is the flag or the variable that has it.
#[derive(Debug, Error)]
#[allow(missing_docs)] // of fields: the messages say what they are
pub enum ConfigError {
    /// It is no value of its option.
    #[error("{given} is {value}: {why}; it takes: {takes}")]
    Value { given: String, value: String, why: BadValue, takes: &'static str },
    /// Docker's `--env-file` and balena's dashboard keep quotes, unlike a shell.
    #[error("{given} has quotes around its value, and they are part of it: remove them")]
    Quotes { given: String },
    #[error("{given} is not UTF-8")]
    NotUtf8 { given: &'static str },
    #[error("{given} and {other} are set to different values: set one of them")]
    Different { given: &'static str, other: &'static str },
    #[error("{given} and {other} are both set: set one of them")]
    TwoKeys { given: String, other: String },
    /// A name of nothing would check every device.
    #[error("NAME is empty: give a part of a device's name, or leave it out to check every device")]
    NoName,
    #[error(
        "API_KEY is not set: create a named API key in balenaCloud's dashboard (Preferences, Access tokens) and set API_KEY \
         to it, or API_KEY_FILE to a file that holds it"
    )]
    NoKey,
    #[error("{given} {why}")]
    Key { given: String, why: BadSecret },
    /// The file of a key or a token cannot be used.
    #[error("{given} is {value}: the file {why}; it takes the path of a file with the {what}")]
    SecretFile { given: String, value: String, why: BadSecret, what: &'static str },
    /// Two options name different ways to reach a device.
    #[error("USE_PUBLIC_URLS is true, but {given} is {value}: set one of them")]
    Address { given: String, value: String },
    /// Prometheus tells targets apart by job and address. All public URLs of a device are one address.
    #[error("exporters (--exporter, EXPORTERS) {0} and {1} are the same target to Prometheus: give each its own name")]
    SameTarget(String, String),
    /// The system does not list the addresses of this machine.
    #[error(
        "cannot read the addresses of this machine, which --address lan (TARGET_ADDRESS=lan) needs: {0}; does a sandbox forbid netlink sockets?"
    )]
    Interfaces(std::io::Error),
}

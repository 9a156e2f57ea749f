//! How tags and labels of services are spelled: `prometheus.io.port`, or `prometheus.io/port` as in Kubernetes.

use std::collections::BTreeMap;

use crate::values::BadValue;

/// What each begins with, before a dot or a slash.
pub const PREFIX: &str = "prometheus.io";
/// The tag of a device or a fleet, and the label of a service, that mutes its alerts: `false`.
pub const ALERT: &str = "alert";
/// More exporters of one device or one release could be an attempt to flood Prometheus.
pub const MAX_EXPORTERS: usize = 16;
/// Beginnings, in whatever case, of what is meant for this program. People mistype it.
const SIMILAR: [&str; 6] =
    ["prometheus.", "prometheus/", "prometheus-io", "prometheus_io", "prometheusio", "io.prometheus"];
/// Characters of a value that a warning shows.
const SHOWN_VALUE: usize = 80;
/// Characters of what is wrong with it, which may quote all of it.
const SHOWN_ERROR: usize = 200;

/// The tags of a device or a fleet, or the labels of a service: the key as it is written and the value, by the name behind the
/// prefix.
pub type Declarations<'a> = BTreeMap<&'a str, (&'a str, &'a str)>;

/// Why a key has no effect.
#[derive(Clone, Copy)]
pub enum Unused {
    /// It is meant for this program and has none of the known names.
    Unknown,
    /// The same name is there in the other spelling.
    OtherSpelling,
}

/// Reads keys and values. If a name is there twice, the spelling with a dot counts, and then the lesser value, since the API's
/// order may change. `unused` gets each key that has no effect.
pub fn read<'a>(
    pairs: impl Iterator<Item = (&'a str, &'a str)>, known: &[&str], mut unused: impl FnMut(&'a str, Unused),
) -> Declarations<'a> {
    let mut read = Declarations::new();
    for (key, value) in pairs {
        let name = key.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix(['.', '/']));
        if let Some(name) = name.filter(|name| known.contains(name)) {
            let new = (key, value);
            let found = read.entry(name).or_insert(new);
            let lost = new.max(*found); // a dot is less than a slash
            *found = new.min(*found);
            if lost.0 != found.0 {
                unused(lost.0, Unused::OtherSpelling);
            }
        } else if is_similar(key) {
            unused(key, Unused::Unknown);
        }
    }
    read
}

fn is_similar(key: &str) -> bool {
    SIMILAR.iter().any(|with| key.get(..with.len()).is_some_and(|start| start.eq_ignore_ascii_case(with)))
}

/// `prometheus.io.port is "x": why`, no longer than a line of the log may be.
pub fn wrong(key: &str, value: &str, why: &BadValue) -> String {
    let value: String = value.chars().take(SHOWN_VALUE).collect();
    let why: String = why.to_string().chars().take(SHOWN_ERROR).collect();
    format!("{key} is {value:?}: {why}")
}

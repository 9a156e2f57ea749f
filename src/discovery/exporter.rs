//! An exporter: `[NAME:]PORT[/PATH]`, in an option and in a tag.

use std::fmt;

use crate::values::{BadValue, Millis, items};

/// Jobs of the stack's own services. A device that took one of these names could silence alerts about the stack.
const RESERVED: [&str; 5] = ["alertmanager", "baletheus", "baletheus-tunnel", "grafana", "prometheus"];

/// An exporter on a device, and how it is scraped.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Exporter {
    /// Becomes the label `job`. Dashboards made for `job="node"` then work without a change.
    pub name: Option<String>,
    /// TCP port on the device, 1 to 65535.
    pub port: u16,
    /// Path of the metrics with its leading slash; none is `/metrics`.
    pub path: Option<String>,
    /// The service whose labels declare it.
    pub service: Option<String>,
    /// `http` or `https`; none is the scrape config's.
    pub scheme: Option<&'static str>,
    /// None is the scrape config's.
    pub interval: Option<Millis>,
    /// None is the scrape config's. It is no longer than the interval: Prometheus drops such a target.
    pub timeout: Option<Millis>,
}

impl Exporter {
    /// One that is scraped as the scrape config says.
    pub fn new(name: Option<String>, port: u16, path: Option<String>) -> Self {
        Exporter { name, port, path, service: None, scheme: None, interval: None, timeout: None }
    }
}

impl fmt::Display for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if let Some(name) = &self.name {
            write!(f, "{name}:")?;
        }
        write!(f, "{}{}", self.port, self.path.as_deref().unwrap_or_default())
    }
}

/// Reads a comma-separated list of exporters and skips empty items.
///
/// # Errors
/// An item cannot be understood, or the list is empty.
pub fn parse_list(text: &str) -> Result<Vec<Exporter>, BadValue> {
    let list: Vec<_> = items(text).map(parse).collect::<Result<_, _>>()?;
    if list.is_empty() { Err("it names no exporter".into()) } else { Ok(list) }
}

/// An exporter from `PORT[/PATH]`, and the path of another label or tag, which counts if the port has none.
pub fn with_path(name: Option<&str>, port: &str, path: Option<&str>) -> Result<Exporter, BadValue> {
    if port.contains(':') {
        return Err(format!("{port:?} is not PORT[/PATH]").into());
    }
    let path = path.filter(|_| !port.contains('/')).unwrap_or_default();
    let name = name.map_or_else(String::new, |name| format!("{name}:"));
    parse(&format!("{name}{port}{path}"))
}

/// Reads the path of a label or tag.
pub fn path(path: &str) -> Result<&str, BadValue> {
    if path.is_empty() || path.starts_with('/') { Ok(path) } else { Err("it does not begin with /".into()) }
}

fn parse(text: &str) -> Result<Exporter, BadValue> {
    let (address, path) = text.split_at(text.find('/').unwrap_or(text.len()));
    if address.ends_with(':') && path.starts_with("//") {
        return Err(format!("{text:?} is a URL: write [NAME:]PORT[/PATH]").into());
    }
    let is_one = |part: &str| part.contains(':') || part.starts_with(|c: char| c.is_ascii_digit());
    if address.contains(';') || (text.contains(char::is_whitespace) && text.split_whitespace().all(is_one)) {
        return Err(format!("{text:?} is not one exporter: separate exporters with commas").into());
    }
    let path = Some(path).filter(|path| !path.is_empty());
    let (name, port) = address.split_once(':').map_or((None, address), |(name, port)| (Some(name), port));
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if let Some(number) = name.filter(|name| is_number(name) && !is_number(port)) {
        return Err(format!("{text:?} has its name behind the port: write {port}:{number}").into());
    }
    // from_str would take "+80" as well
    let port = Some(port).filter(|port| !port.starts_with('+')).and_then(|port| port.parse().ok());
    let port = port.filter(|port| *port > 0).ok_or_else(|| format!("{text:?} has no port from 1 to 65535"))?;
    name.map_or(Ok(()), check_name)
        .map_err(|error| format!("the name in {text:?} {error}; give the exporter another name"))?;
    // Prometheus escapes `?`, `#` and `%`: they would not reach the device.
    let is_path = |path: &str| path.len() <= 1024 && path.bytes().all(|b| is_one_of(b, b"/-._~!$&'()*+;=:@"));
    if text.contains('?') {
        return Err(format!(
            "{text:?} has a query, which a target cannot carry: leave it out, and give a Prometheus job its params, by \
             __meta_balena_exporter (docs/prometheus.md)"
        )
        .into());
    }
    if !path.is_none_or(is_path) {
        return Err(format!("the path in {text:?} is not a plain path").into());
    }
    Ok(Exporter::new(name.map(str::to_owned), port, path.map(str::to_owned)))
}

/// Checks the name of an exporter, which becomes its job.
///
/// # Errors
/// What is wrong with it, as the end of a sentence.
pub fn check_name(name: &str) -> Result<(), BadValue> {
    if !(1..=64).contains(&name.len()) || !name.bytes().all(|b| is_one_of(b, b"_.-")) {
        return Err("is not 1 to 64 of a-z A-Z 0-9 _ . -".into());
    }
    if RESERVED.contains(&name.to_ascii_lowercase().as_str()) {
        return Err(format!("is reserved: {name} is a job of the stack").into());
    }
    Ok(())
}

fn is_one_of(byte: u8, others: &[u8]) -> bool {
    byte.is_ascii_alphanumeric() || others.contains(&byte)
}

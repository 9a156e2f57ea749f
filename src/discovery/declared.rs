//! What a fleet's `docker-compose.yml` declares: labels of services, release by release.

use std::collections::BTreeMap;
use std::num::NonZeroU64;

use super::exporter::{self, Exporter};
use crate::balena::release::{Release, Service};
use crate::values::{BadValue, boolean, items, one_of, scrape_interval, scrape_timeout};

/// What every label begins with, before a dot or a slash.
const PREFIX: &str = "prometheus.io";
/// The labels that are understood.
const KNOWN: [&str; 8] = ["port", "path", "job", "scheme", "interval", "timeout", "scrape", ALERT];
/// The label that leaves a service out of the alerts. It says nothing of an exporter.
const ALERT: &str = "alert";
/// Exporters that a release may declare.
const MAX_EXPORTERS: usize = 16;
/// Characters of a value that a warning shows.
const SHOWN_VALUE: usize = 80;

/// What the services of a release declare.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Declared {
    /// Id of the release.
    pub release: u64,
    /// The exporters, in the order of the services.
    pub exporters: Vec<ServiceExporter>,
    /// Ids of its images.
    pub images: Vec<NonZeroU64>,
    /// Services whose label leaves them out of the alerts.
    pub muted: Vec<String>,
    /// Problems, each with fleet, release and service.
    pub warnings: Vec<String>,
}

impl Declared {
    /// Bytes that it keeps, about.
    pub fn size(&self) -> usize {
        let warnings: usize = self.warnings.iter().map(String::len).sum();
        warnings + self.exporters.len() * size_of::<ServiceExporter>()
    }
}

/// An exporter that a service declares.
#[derive(Debug, PartialEq, Eq)]
pub struct ServiceExporter {
    /// Its port and path. Its name is the label `job`, or else the name of the service.
    pub exporter: Exporter,
    /// The name of the service.
    pub service: String,
    /// `http` or `https`.
    pub scheme: Option<&'static str>,
    /// The interval as it is written, and in milliseconds.
    pub interval: Option<(String, u64)>,
    /// The time-out, no longer than the interval.
    pub timeout: Option<(String, u64)>,
}

/// What the services of a release declare. A service that cannot be understood is skipped and does not affect the others.
pub fn declared(release: &Release) -> Declared {
    let mut declared = Declared { release: release.id, ..Declared::default() };
    for service in &release.services {
        let place = format!("service {} of release {} of fleet {}", service.name, release.version, release.fleet);
        let labels = labels(service);
        for name in labels.keys().filter(|name| !KNOWN.contains(name)) {
            declared.warnings.push(format!("{place} has the label {PREFIX}.{name}, which baletheus does not know"));
        }
        declared.images.extend(service.image);
        match labels.get(ALERT).map(|text| boolean(text).map_err(|error| wrong(ALERT, text, &error))) {
            Some(Ok(false)) => declared.muted.push(service.name.clone()),
            Some(Err(error)) => declared.warnings.push(format!("{place}: {error}; it counts as absent")),
            _ => {}
        }
        match exporters(service, &labels) {
            Ok(exporters) => declared.exporters.extend(exporters),
            Err(error) => declared.warnings.push(format!("{place} is not scraped: {error}")),
        }
    }
    if declared.exporters.len() > MAX_EXPORTERS {
        let (version, fleet) = (&release.version, &release.fleet);
        declared.warnings.push(format!(
            "release {version} of fleet {fleet} declares more than {MAX_EXPORTERS} exporters; the first {MAX_EXPORTERS} are scraped"
        ));
        declared.exporters.truncate(MAX_EXPORTERS);
    }
    declared
}

/// The labels by their names without the prefix. The spelling with a dot wins over Kubernetes' spelling with a slash.
fn labels(service: &Service) -> BTreeMap<&str, &str> {
    let with = |separator: char| {
        service.labels.iter().filter_map(move |(name, value)| {
            let name = name.strip_prefix(PREFIX)?.strip_prefix(separator)?;
            Some((name, value.trim()))
        })
    };
    with('/').chain(with('.')).collect()
}

fn exporters(service: &Service, labels: &BTreeMap<&str, &str>) -> Result<Vec<ServiceExporter>, BadValue> {
    if let Some(text) = labels.get("scrape")
        && !boolean(text).map_err(|error| wrong("scrape", text, &error))?
    {
        return Ok(Vec::new());
    }
    let Some(ports) = labels.get("port") else {
        let has_others = labels.keys().any(|name| KNOWN.contains(name) && *name != ALERT);
        return if has_others { Err(format!("it has no label {PREFIX}.port").into()) } else { Ok(Vec::new()) };
    };
    let scheme = match labels.get("scheme") {
        Some(text) => {
            let known = [("http", "http"), ("https", "https")];
            Some(one_of(text, known).map_err(|error| wrong("scheme", text, &error))?)
        }
        None => None,
    };
    let interval = duration(labels, "interval", scrape_interval)?;
    let timeout = duration(labels, "timeout", scrape_timeout)?;
    match (&interval, &timeout) {
        (None, Some((text, _))) => return Err(wrong("timeout", text, &"it needs an interval beside it".into())),
        (Some((_, interval)), Some((text, timeout))) if timeout > interval => {
            return Err(wrong(
                "timeout",
                text,
                &"it is longer than the interval, and Prometheus drops such a target".into(),
            ));
        }
        _ => {}
    }
    let job = labels.get("job").copied();
    let name = job.unwrap_or(&service.name);
    exporter::check_name(name).map_err(|error| match job {
        Some(job) => wrong("job", job, &format!("it {error}").into()),
        None => format!("its name {error}; the label {PREFIX}.job gives its exporters another one").into(),
    })?;
    let ports: Vec<&str> = items(ports).collect();
    if ports.is_empty() {
        return Err(wrong("port", "", &"it names no port".into()));
    }
    ports
        .into_iter()
        .map(|port| {
            let exporter = exporter::named(name, port, labels.get("path").copied())
                .map_err(|error| wrong("port", port, &error))?;
            let (interval, timeout) = (interval.clone(), timeout.clone());
            Ok(ServiceExporter { exporter, service: service.name.clone(), scheme, interval, timeout })
        })
        .collect()
}

fn duration(
    labels: &BTreeMap<&str, &str>, name: &str, read: fn(&str) -> Result<(&str, u64), BadValue>,
) -> Result<Option<(String, u64)>, BadValue> {
    let Some(text) = labels.get(name) else { return Ok(None) };
    let (text, millis) = read(text).map_err(|error| wrong(name, text, &error))?;
    Ok(Some((text.to_owned(), millis)))
}

fn wrong(name: &str, value: &str, error: &BadValue) -> BadValue {
    let shown: String = value.chars().take(SHOWN_VALUE).collect();
    let error: String = error.to_string().chars().take(200).collect(); // it may quote all of the value
    format!("its label {PREFIX}.{name} is {shown:?}: {error}").into()
}

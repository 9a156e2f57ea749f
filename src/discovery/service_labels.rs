//! What a fleet's `docker-compose.yml` declares: labels of services, release by release.

use std::num::NonZeroU64;

use super::exporter::{self, Exporter};
use super::label_prefix::{self, ALERT, Declarations, MAX_EXPORTERS, PREFIX, Unused, wrong};
use crate::balena::device::up_to;
use crate::balena::{ReleaseServices, Service};
use crate::values::{BadValue, boolean, items, scheme, scrape_interval, scrape_timeout};

const KNOWN: [&str; 8] = [ALERT, "interval", "job", "path", "port", "scheme", "scrape", "timeout"];

#[derive(Debug, Default, PartialEq, Eq, Hash)]
pub struct Declared {
    pub release: u64,
    /// The exporters, in the order of the services.
    pub exporters: Vec<Exporter>,
    pub images: Vec<NonZeroU64>,
    /// Services whose label leaves them out of the alerts.
    pub muted: Vec<String>,
    /// Problems, each with fleet, release and service.
    pub warnings: Vec<String>,
}

/// What the services of a release declare. A service that cannot be understood is skipped and does not affect the others.
pub fn declared(release: &ReleaseServices) -> Declared {
    let mut problems = Vec::new();
    let services = release.services(&mut problems);
    let warnings = problems.iter().map(|problem| format!("{release}: {problem}")).collect();
    let mut declared = Declared { release: release.id, warnings, ..Declared::default() };
    for service in &services {
        let place = format!("service {} of {release}", service.name);
        let mut labels = Declarations::new();
        for source in &service.labels {
            labels.extend(label_prefix::read(source.iter().copied(), &KNOWN, |key, why| {
                let why = match why {
                    Unused::Unknown => "which baletheus does not know",
                    Unused::OtherSpelling => "which has no effect beside the same one with a dot",
                };
                declared.warnings.push(format!("{place} has the label {}, {why}", up_to(100, key)));
            }));
        }
        declared.images.extend(service.image);
        match read(&labels, ALERT, boolean) {
            Ok(Some(false)) => declared.muted.push(service.name.to_owned()),
            Err(error) => declared.warnings.push(format!("{place}: {error}; it counts as absent")),
            _ => {}
        }
        if let (Some((path, _)), Some((port, ports))) = (labels.get("path"), labels.get("port"))
            && items(ports).all(|port| port.contains('/'))
        {
            declared.warnings.push(format!("{place} has the label {path}, which has no effect: {port} has a path"));
        }
        match exporters(service, &labels) {
            Ok(exporters) => declared.exporters.extend(exporters),
            Err(error) => declared.warnings.push(format!("{place} is not scraped: {error}")),
        }
    }
    if declared.exporters.len() > MAX_EXPORTERS {
        let most = format!("{MAX_EXPORTERS} exporters; the first {MAX_EXPORTERS} are scraped");
        declared.warnings.push(format!("{release} declares more than {most}"));
        declared.exporters.truncate(MAX_EXPORTERS);
    }
    declared
}

fn exporters(service: &Service, labels: &Declarations) -> Result<Vec<Exporter>, BadValue> {
    if read(labels, "scrape", boolean)? == Some(false) {
        return Ok(Vec::new());
    }
    let Some((key, ports)) = labels.get("port") else {
        // `alert` says nothing of an exporter.
        let has_others = labels.keys().any(|name| *name != ALERT);
        return if has_others { Err(format!("it has no label {PREFIX}.port").into()) } else { Ok(Vec::new()) };
    };
    let scheme = read(labels, "scheme", scheme)?;
    let interval = read(labels, "interval", scrape_interval)?;
    let timeout = read(labels, "timeout", |text| match (scrape_timeout(text)?, &interval) {
        (_, None) => Err("it needs an interval beside it".into()),
        (timeout, Some(interval)) if timeout.1 > interval.1 => {
            Err("it is longer than the interval, and Prometheus drops such a target".into())
        }
        (timeout, _) => Ok(timeout),
    })?;
    let job = read(labels, "job", |job| {
        exporter::check_name(job).map(|()| job).map_err(|error| format!("it {error}").into())
    })?;
    let name = job.unwrap_or(service.name);
    exporter::check_name(name)
        .map_err(|error| format!("its name {error}; the label {PREFIX}.job gives its exporters another one"))?;
    let bad_port = |port: &str, error: &BadValue| BadValue::from(format!("its label {}", wrong(key, port, error)));
    if items(ports).next().is_none() {
        return Err(bad_port("", &"it names no port".into()));
    }
    let path = read(labels, "path", exporter::path)?;
    let exporters = items(ports).map(|port| {
        let exporter = exporter::with_path(Some(name), port, path).map_err(|error| bad_port(port, &error))?;
        let (service, interval, timeout) = (Some(service.name.to_owned()), interval.clone(), timeout.clone());
        Ok(Exporter { service, scheme, interval, timeout, ..exporter })
    });
    exporters.collect()
}

/// The value of a label, if it is there.
fn read<'a, T>(
    labels: &Declarations<'a>, name: &str, parse: impl Fn(&'a str) -> Result<T, BadValue>,
) -> Result<Option<T>, BadValue> {
    let Some((key, value)) = labels.get(name) else { return Ok(None) };
    parse(value.trim()).map(Some).map_err(|error| format!("its label {}", wrong(key, value, &error)).into())
}

//! Exporters that a fleet's `docker-compose.yml` declares: labels of services, release by release.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroU64;
use std::sync::Arc;

use serde_json::value::RawValue;

use super::exporter::{self, Exporter};
use crate::balena::device::{describe, records};
use crate::balena::pages::{List, Pages, Place, WithId};
use crate::balena::release::{self, Release, Service};
use crate::balena::{Answer, Failure, Reason, Request, Source};
use crate::values::{BadValue, boolean, items, one_of, scrape_interval, scrape_timeout};

/// What every label begins with, before a dot or a slash.
const PREFIX: &str = "prometheus.io";
/// The labels that are understood.
const KNOWN: [&str; 8] = ["port", "path", "job", "scheme", "interval", "timeout", "scrape", ALERT];
/// The label that leaves a service out of the alerts. It says nothing of an exporter.
const ALERT: &str = "alert";
/// Exporters that a release may declare.
const MAX_EXPORTERS: usize = 16;
/// Ids in one request: the API refuses a URL of more than 15,000 bytes.
const MAX_IDS: usize = 500;
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
    warnings: Vec<String>,
}

impl Declared {
    /// Bytes that it keeps, about.
    fn size(&self) -> usize {
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

/// What the running releases declare. An unchanged release keeps its [`Declared`], so that a comparison of pointers tells
/// whether a device has to be mapped again.
#[derive(Default)]
pub struct Services {
    pages: Pages<Vec<Arc<Declared>>>,
    by_release: HashMap<u64, Arc<Declared>>,
    version: u64,
    /// The server does not know releases.
    missing: bool,
}

impl Services {
    /// Rises with each change.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// What a release declares.
    pub fn get(&self, release: u64) -> Option<&Arc<Declared>> {
        self.by_release.get(&release)
    }

    /// Problems with labels.
    pub fn warnings(&self) -> impl Iterator<Item = &str> {
        let missing = self.missing.then_some(
            "this server does not know releases: labels of services are not read; set --service-labels=false \
             (SERVICE_LABELS=false) to stop asking for them",
        );
        let declared = self.pages.contents().flatten();
        declared.flat_map(|declared| &declared.warnings).map(String::as_str).chain(missing)
    }

    /// Asks for the releases that the selected fleets' devices run.
    ///
    /// # Errors
    /// The request fails. Only 404 before the first success means that there are no labels: a stopped database answers 401 or 500.
    pub fn refresh(&mut self, source: &mut dyn Source) -> Result<(), Failure> {
        let mut changed = false;
        let mut list = ReleaseList { source, known: &self.by_release };
        match self.pages.refresh(&mut list, || changed = true) {
            Ok(()) => self.missing = false,
            // A load balancer may answer 404 for a moment. Labels that were read before are not gone for that.
            Err(failure) if failure.reason == Reason::NotFound && self.by_release.is_empty() => self.missing = true,
            // A wrong key or a stopped database is not about labels: no device can be read either.
            Err(failure) if failure.is_of_this_request() => {
                let devices = source.get(Request::Devices { after: 0, limit: 1 }, None);
                return Err(devices.err().unwrap_or_else(|| explained(failure)));
            }
            Err(failure) => return Err(failure),
        }
        if changed {
            let declared = self.pages.contents().flatten();
            self.by_release = declared.map(|declared| (declared.release, declared.clone())).collect();
            self.version += 1;
        }
        Ok(())
    }

    /// Asks for releases that devices run and that the last answer did not hold: they started in between.
    ///
    /// # Errors
    /// The request fails, or the API does not know one of the releases. They are never read as releases without labels.
    pub fn fetch(&mut self, source: &mut dyn Source, releases: &[u64]) -> Result<(), Failure> {
        let unknown: BTreeSet<u64> = releases.iter().copied().filter(|id| !self.by_release.contains_key(id)).collect();
        let unknown: Vec<u64> = unknown.into_iter().collect();
        if unknown.is_empty() || self.missing {
            return Ok(());
        }
        for ids in unknown.chunks(MAX_IDS) {
            let mut list = ReleaseList { source, known: &self.by_release };
            for declared in list.named(ids).map_err(explained)? {
                self.by_release.insert(declared.release, declared);
            }
        }
        match unknown.iter().find(|id| !self.by_release.contains_key(id)) {
            Some(id) => {
                let why = format!("a device runs release {id}, and the API does not list it");
                Err(explained(ReleaseList { source, known: &self.by_release }.invalid(&why)))
            }
            None => Ok(()),
        }
    }
}

struct ReleaseList<'a> {
    source: &'a mut dyn Source,
    known: &'a HashMap<u64, Arc<Declared>>,
}

impl ReleaseList<'_> {
    /// The releases with these ids.
    fn named(&mut self, ids: &[u64]) -> Result<Vec<Arc<Declared>>, Failure> {
        let answer = self.source.get(Request::ReleasesById(ids), None)?;
        let Answer::Body { body, .. } = answer else { return Err(self.invalid("it is too large")) };
        let records = records(&body).map_err(|error| self.invalid(&describe(&error)))?;
        records.into_iter().map(|raw| self.release(raw)).collect()
    }

    /// Reads a release. An unchanged one keeps its [`Declared`].
    fn release(&mut self, raw: &RawValue) -> Result<Arc<Declared>, Failure> {
        let release = release::parse(raw).map_err(|error| self.invalid(&describe(&error)))?;
        let declared = declared(&release);
        let known = self.known.get(&declared.release).filter(|known| ***known == declared);
        Ok(known.cloned().unwrap_or_else(|| declared.into()))
    }
}

impl List for ReleaseList<'_> {
    type Page = Vec<Arc<Declared>>;
    type Record<'a> = Arc<Declared>;
    const WHAT: &'static str = "releases";

    fn source(&mut self) -> &mut dyn Source {
        self.source
    }

    fn request(&self, after: u64, limit: usize) -> Request<'static> {
        Request::Releases { after, limit }
    }

    fn next_id(&self, after: u64) -> Request<'static> {
        Request::NextRelease(after)
    }

    fn read(
        &mut self, records: Vec<&RawValue>, _: &Place<'_, Self::Page>,
    ) -> Result<Vec<WithId<Arc<Declared>>>, Failure> {
        let read = |raw| self.release(raw).map(|declared| (Some(declared.release), declared));
        records.into_iter().map(read).collect()
    }

    fn page(&mut self, declared: Vec<WithId<Arc<Declared>>>) -> Result<(Self::Page, usize), Failure> {
        let declared: Vec<_> = declared.into_iter().map(|(_, declared)| declared).collect();
        let size = declared.iter().map(|declared| declared.size()).sum();
        Ok((declared, size))
    }
}

/// Says how to go on without labels: devices can be read.
fn explained(failure: Failure) -> Failure {
    if !failure.is_of_this_request() {
        return failure;
    }
    let why = match failure.status {
        Some(status @ (401 | 403)) => format!("the key may read devices, but not releases (the API answers {status})"),
        _ => failure.message,
    };
    let message = format!(
        "cannot read the labels of services: {why}; --service-labels=false (SERVICE_LABELS=false) turns this request off"
    );
    Failure { message, ..failure }
}

/// What the services of a release declare. A service that cannot be understood is skipped and does not affect the others.
fn declared(release: &Release) -> Declared {
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

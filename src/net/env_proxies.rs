//! The proxies that the environment names: which one a URL goes through, for every client of the program.

use std::ffi::OsString;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use hyper::Uri;
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use ipnet::IpNet;

/// A proxy. Neither `Display` nor `Debug` shows the user and the password.
#[derive(Clone, Debug)]
pub struct EnvProxy {
    found: Intercept,
    variable: &'static str,
}

impl fmt::Display for EnvProxy {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} ({})", self.uri().to_string().trim_end_matches('/'), self.variable)
    }
}

impl EnvProxy {
    /// As reqwest takes it, for every request of a client.
    ///
    /// # Errors
    /// reqwest cannot use its URL.
    pub fn for_reqwest(&self) -> reqwest::Result<reqwest::Proxy> {
        let proxy = reqwest::Proxy::all(self.uri().to_string())?;
        Ok(match self.found.basic_auth() {
            Some(authorization) => proxy.custom_http_auth(authorization.clone()),
            None => proxy,
        })
    }

    /// The URL without user and password.
    pub fn uri(&self) -> &Uri {
        self.found.uri()
    }

    /// The value of `Proxy-Authorization`, if the URL has a user.
    pub fn authorization(&self) -> Option<&str> {
        self.found.basic_auth()?.to_str().ok()
    }
}

/// The proxies of the environment, and the hosts that are reached without them.
#[derive(Clone, Debug)]
pub struct EnvProxies {
    matcher: Arc<Matcher>,
    /// The variables that have the proxies for http and for https.
    variables: [&'static str; 2],
}

impl EnvProxies {
    /// Reads `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, in upper or lower case. A value that cannot be used is
    /// ignored, with a warning for the log.
    pub fn from_env(var: &dyn Fn(&str) -> Option<OsString>) -> (Self, Vec<String>) {
        let mut warnings = Vec::new();
        let mut given = |names: [&'static str; 2]| {
            let (name, value) =
                names.iter().find_map(|name| Some((*name, var(name)?)).filter(|(_, v)| !v.is_empty()))?;
            let Ok(text) = value.into_string() else {
                warnings.push(format!("{name} is ignored: it is not UTF-8"));
                return None;
            };
            Some((name, text.trim().to_owned()))
        };
        // A CGI program gets HTTP_PROXY from the header `Proxy` of a request.
        let http = given(["HTTP_PROXY", "http_proxy"]).filter(|_| var("REQUEST_METHOD").is_none());
        let [https, all, none] =
            [["HTTPS_PROXY", "https_proxy"], ["ALL_PROXY", "all_proxy"], ["NO_PROXY", "no_proxy"]].map(given);
        let [http, https, all] = [http, https, all].map(|given| {
            let (name, text) = given?;
            let refuse = |why| warnings.push(format!("{name} is ignored: {why}; it takes http://HOST:PORT"));
            check_url(&text).map_err(refuse).ok()?;
            Some((name, text))
        });
        let (none, excluded) = none.unwrap_or_default();
        let [http, https] = [http, https].map(|proxy| proxy.or_else(|| all.clone()).unwrap_or_default());
        let matcher = Matcher::builder().http(http.1).https(https.1).no(exclusions(none, &excluded, &mut warnings));
        (EnvProxies { matcher: matcher.build().into(), variables: [http.0, https.0] }, warnings)
    }

    /// The proxy for this URL, unless its host is excluded.
    pub fn find(&self, url: &Uri) -> Option<EnvProxy> {
        let variable = self.variables[usize::from(url.scheme_str() == Some("https"))];
        Some(EnvProxy { found: self.matcher.intercept(url)?, variable })
    }
}

/// Checks the URL of a proxy. Without a scheme it is an http proxy.
fn check_url(text: &str) -> Result<(), &'static str> {
    let any = Uri::from_static("http://host");
    let found = Matcher::builder().all(text).build().intercept(&any);
    match found.as_ref().map(Intercept::uri) {
        Some(uri) if !matches!(uri.scheme_str(), Some("http" | "https")) => {
            Err("only http:// and https:// proxies are supported")
        }
        // A Uri takes a port above 65535.
        Some(uri) if reqwest::Url::parse(&uri.to_string()).is_ok_and(|url| url.has_host()) => Ok(()),
        _ => Err("it is no URL of a proxy"),
    }
}

/// The hosts of `NO_PROXY`, as the matcher takes them: it knows neither blanks between them nor `*.` before a domain, and
/// its `*` is for names only.
fn exclusions(variable: &str, text: &str, warnings: &mut Vec<String>) -> String {
    let entries = text.split([',', ' ', '\t']).filter(|entry| !entry.is_empty());
    let known = entries.filter_map(|entry| {
        let bare = entry.trim_matches(['[', ']']).trim_end_matches('.');
        let bare = bare.strip_prefix('*').filter(|domain| domain.starts_with('.')).unwrap_or(bare);
        let is_name = || bare.chars().all(|c| c.is_alphanumeric() || ".-_".contains(c)) && !bare.is_empty();
        if bare == "*" {
            return Some("*,0.0.0.0/0,::/0");
        }
        if bare.parse::<IpNet>().is_ok() || bare.parse::<IpAddr>().is_ok() || is_name() {
            return Some(bare);
        }
        let what = "which is no host, network or * (a port does not belong there)";
        warnings.push(format!("{variable} has {entry:?}, {what}: this entry is ignored"));
        None
    });
    known.collect::<Vec<_>>().join(",")
}

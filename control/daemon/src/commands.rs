//! Carries out requests.

use std::{sync::Arc, time::Duration};

use everdisk_api::{operation::OperationName, quantity::check_pause_budget, request::Request};
use everdisk_proto::{frame::GateState, limits::LEASE_MAX, version::PRODUCT};
use everdisk_upgrade::step::Limits;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    attach::attach,
    catalogue::{Catalogue, Shape},
    detach::detach,
    error::{Error, Result},
    flush::{Patience, flush},
    give_up::Force,
    nodes::May,
    progress::Progress,
    status,
    upgrade::{self, Wish},
    volume::Volume,
};

/// Carries out one request.
///
/// # Errors
/// Why it was not done.
pub fn carry_out(catalogue: &Catalogue, request: Request, progress: &Progress) -> Result<Value> {
    match request {
        Request::Version => Ok(json!({ "version": PRODUCT, "pid": std::process::id() })),
        Request::VolumeCreate { name, size, stripe, buffer, bypass, timeouts, nodes, create_dir, force } => {
            let shape = Shape { size, stripe, buffer, bypass, timeouts };
            let (volume, warnings) = catalogue.create(&name, shape, nodes, May { create_dir, force }, progress)?;
            with(&status::describe(&volume), "warnings", json!(warnings))
        }
        Request::VolumeList => {
            let mut lines = status::lines(&catalogue.all());
            lines.extend(catalogue.damaged().into_iter().map(|(name, why)| status::damaged_line(&name, why)));
            lines.sort_by(|a, b| a.name.cmp(&b.name));
            shown(&lines)
        }
        Request::VolumeShow { name } => shown(&status::describe(&*catalogue.get(&name)?)),
        Request::VolumeResize { name, size } => {
            let (volume, warnings) = catalogue.resize(&name, size, progress)?;
            with(&status::describe(&volume), "warnings", json!(warnings))
        }
        Request::VolumeDelete { name, force } => {
            let left = catalogue.delete(&name, force, progress)?;
            Ok(json!({ "name": name, "deleted": true, "warnings": left }))
        }
        Request::VolumeForget { name } => {
            let files = catalogue.forget(&name)?;
            Ok(json!({ "name": name, "forgotten": true, "files": files }))
        }
        Request::Attach { name, file, nbd } => {
            let volume = catalogue.get(&name)?;
            attach(catalogue, &volume, file.as_ref(), &nbd, progress)?;
            shown(&status::status(&volume))
        }
        Request::Detach { name, force, yes } => {
            if force && let Some(volume) = catalogue.begin_record_anew(&name, yes)? {
                return with(&status::status(&volume), "given_up_bytes", Value::Null);
            }
            let volume = catalogue.get(&name)?;
            let given_up = detach(&volume, Force::new(force, yes), progress)?;
            with(&status::status(&volume), "given_up_bytes", json!(given_up))
        }
        Request::Status { name: Some(name) } => {
            let damaged = catalogue.damaged().into_iter().find(|(damaged, _)| *damaged == name);
            match damaged {
                Some((name, why)) => shown(&status::damaged(&name, why)),
                None => shown(&status::status(&*catalogue.get(&name)?)),
            }
        }
        Request::Status { name: None } => {
            let mut all = status::statuses(&catalogue.all());
            all.extend(catalogue.damaged().into_iter().map(|(name, why)| status::damaged(&name, why)));
            all.sort_by(|a, b| a.name.cmp(&b.name));
            shown(&all)
        }
        Request::Flush { name } => {
            let volume = catalogue.get(&name)?;
            let _operation = volume.begin(OperationName::Flush)?;
            volume.attached()?;
            progress.step("flush");
            flush(&volume, Patience::OPERATOR, progress)?;
            Ok(json!({ "name": name, "flushed": true, "buffered_bytes": 0 }))
        }
        Request::Suspend { name, lease_ms } => {
            let volume = catalogue.get(&name)?;
            suspend(&volume, Duration::from_millis(lease_ms), progress)?;
            shown(&status::status(&volume))
        }
        Request::Resume { name } => {
            let volume = catalogue.get(&name)?;
            resume(&volume)?;
            shown(&status::status(&volume))
        }
        Request::Upgrade { name, core, handover, flush_limit_ms, pause_budget_ms, soak_ms, plan } => {
            check_pause_budget(Duration::from_millis(pause_budget_ms)).map_err(Error::BadRequest)?;
            let volume = catalogue.get(&name)?;
            let limits = Limits {
                pause_budget: Duration::from_millis(pause_budget_ms),
                soak: Duration::from_millis(soak_ms),
                flush: Duration::from_millis(flush_limit_ms),
            };
            let wish = Wish { core: &core, handover, limits, rollback: false };
            if plan {
                return shown(&upgrade::plan(&volume, wish)?);
            }
            shown(&upgrade::upgrade(&volume, wish, progress)?)
        }
        Request::Rollback { name } => shown(&upgrade::rollback(&catalogue.get(&name)?, progress)?),
    }
}

/// Quiesces a volume: what was acknowledged before the suspension is durable when this returns.
fn suspend(volume: &Arc<Volume>, lease: Duration, progress: &Progress) -> Result<()> {
    if lease.is_zero() || lease > LEASE_MAX {
        return Err(Error::BadRequest(format!(
            "a lease of {lease:?} is not possible: give more than 0 and at most {} s, below the kernel's warning about \
             hung tasks",
            LEASE_MAX.as_secs()
        )));
    }
    let _operation = volume.begin(OperationName::Suspend)?;
    volume.attached()?;
    if volume.interface().status()?.gate == GateState::Suspended {
        return Err(Error::State(format!("volume {0} is suspended already: `everdisk resume {0}`", volume.name)));
    }
    progress.step("flush");
    flush(volume, Patience::OPERATOR, progress)?;
    progress.step("suspend");
    volume.interface().suspend(lease)?;
    // What came between the flush and the suspension. It must end well before the lease does.
    if let Err(e) = flush(volume, Patience::Whole(lease / 2), progress) {
        volume.interface().resume()?;
        return Err(e);
    }
    Ok(())
}

fn resume(volume: &Arc<Volume>) -> Result<()> {
    let _operation = volume.begin(OperationName::Resume)?;
    volume.attached()?;
    if volume.interface().status()?.gate != GateState::Suspended {
        return Err(Error::State(format!(
            "volume {0} is not suspended (its lease may have ended): see `everdisk status {0}`",
            volume.name
        )));
    }
    volume.interface().resume()
}

/// What is shown, and something beside it.
fn with<T: Serialize>(value: &T, key: &str, more: Value) -> Result<Value> {
    let mut value = shown(value)?;
    let map = value.as_object_mut().expect("what is shown of a volume has fields");
    map.insert(key.to_owned(), more);
    Ok(value)
}

fn shown<T: Serialize>(value: &T) -> Result<Value> {
    serde_json::to_value(value).map_err(|e| Error::Failed(e.to_string()))
}

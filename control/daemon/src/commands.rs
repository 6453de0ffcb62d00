//! Carries out requests.

use std::{sync::Arc, time::Duration};

use everdisk_api::{quantity::check_pause_budget, request::Request};
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
        Request::VolumeCreate { name, size, stripe, buffer, nodes } => {
            let shape = Shape { size, stripe, buffer };
            shown(&status::describe(&*catalogue.create(name, shape, nodes, progress)?))
        }
        Request::VolumeList => shown(&catalogue.all().iter().map(|volume| status::line(volume)).collect::<Vec<_>>()),
        Request::VolumeShow { name } => shown(&status::describe(&*catalogue.get(&name)?)),
        Request::VolumeResize { name, size } => shown(&status::describe(&*catalogue.resize(&name, size, progress)?)),
        Request::VolumeDelete { name } => {
            catalogue.delete(&name, progress)?;
            Ok(json!({ "name": name, "deleted": true }))
        }
        Request::Attach { name, file, nbd } => {
            let volume = catalogue.get(&name)?;
            attach(catalogue, &volume, file.as_ref(), &nbd, progress)?;
            shown(&status::status(&volume))
        }
        Request::Detach { name, force } => {
            let volume = catalogue.get(&name)?;
            detach(&volume, force, progress)?;
            shown(&status::status(&volume))
        }
        Request::Status { name: Some(name) } => shown(&status::status(&*catalogue.get(&name)?)),
        Request::Status { name: None } => {
            shown(&catalogue.all().iter().map(|volume| status::status(volume)).collect::<Vec<_>>())
        }
        Request::Flush { name } => {
            let volume = catalogue.get(&name)?;
            let _operation = volume.begin("flush")?;
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
            let wish = Wish { core: &core, handover, limits };
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
    let _operation = volume.begin("suspend")?;
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
    let _operation = volume.begin("resume")?;
    volume.attached()?;
    if volume.interface().status()?.gate != GateState::Suspended {
        return Err(Error::State(format!(
            "volume {0} is not suspended (its lease may have ended): see `everdisk status {0}`",
            volume.name
        )));
    }
    volume.interface().resume()
}

fn shown<T: Serialize>(value: &T) -> Result<Value> {
    serde_json::to_value(value).map_err(|e| Error::Failed(e.to_string()))
}
